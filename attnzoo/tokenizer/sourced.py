"""A str that knows of each character whether a chat template wrote it.

A control token begins or ends a turn, so only the template may write it. Constants of a template are `Sourced`, its
inputs are plain, and string operations (join, slice, strip, upper case) keep track of every character. Where they
cannot, a character counts as given: a control token may become text by that, but text never becomes a control token.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, SupportsIndex

OWN, GIVEN = b"\x01", b"\x00"


class Sourced(str):
    """A text with one byte for each character: `OWN` where the template wrote it, `GIVEN` where it did not."""

    __slots__ = ("_own",)
    _own: bytes

    def __new__(cls, text: str = "", own: bytes | None = None) -> "Sourced":
        self = super().__new__(cls, text)
        self._own = GIVEN * len(text) if own is None else own
        assert len(self._own) == len(text)
        return self

    def __str__(self) -> "Sourced":
        return self

    def __getitem__(self, key: SupportsIndex | slice) -> "Sourced":
        if not isinstance(key, slice):
            at = range(len(self))[key]
            key = slice(at, at + 1)
        return Sourced(super().__getitem__(key), self._own[key])

    def __iter__(self) -> Iterator["Sourced"]:
        return (self[at] for at in range(len(self)))

    def __add__(self, other: str) -> "Sourced":
        return join((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> "Sourced":
        return join((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: SupportsIndex) -> "Sourced":
        return Sourced(super().__mul__(times), self._own * times)

    __rmul__ = __mul__

    def strip(self, chars: str | None = None, /) -> "Sourced":
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> "Sourced":
        return self[len(self) - len(super().lstrip(chars)) :]

    def rstrip(self, chars: str | None = None, /) -> "Sourced":
        return self[: len(super().rstrip(chars))]

    def removeprefix(self, prefix: str, /) -> "Sourced":
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str, /) -> "Sourced":
        return self[: len(self) - len(suffix)] if self.endswith(suffix) else self

    def upper(self) -> "Sourced":
        return self._respelled(super().upper())

    def lower(self) -> "Sourced":
        return self._respelled(super().lower())

    def title(self) -> "Sourced":
        return self._respelled(super().title())

    def capitalize(self) -> "Sourced":
        return self._respelled(super().capitalize())

    def swapcase(self) -> "Sourced":
        return self._respelled(super().swapcase())

    def casefold(self) -> "Sourced":
        return self._respelled(super().casefold())

    def _respelled(self, text: str) -> "Sourced":
        # A letter may become several (German sharp s in capitals); where the length is equal, each stays in its place.
        return Sourced(text, self._own if len(text) == len(self) else None)

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list["Sourced"]:  # type: ignore[override]
        return self._located(super().split(sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list["Sourced"]:  # type: ignore[override]
        return self._located(super().rsplit(sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list["Sourced"]:  # type: ignore[override]
        found, at = [], 0
        for line, whole in zip(super().splitlines(keepends), super().splitlines(True), strict=True):
            found.append(self[at : at + len(line)])
            at += len(whole)
        return found

    def partition(self, sep: str, /) -> tuple["Sourced", "Sourced", "Sourced"]:
        return self._parted(self.find(sep), len(sep)) if sep in self else (self, Sourced(), Sourced())

    def rpartition(self, sep: str, /) -> tuple["Sourced", "Sourced", "Sourced"]:
        return self._parted(self.rfind(sep), len(sep)) if sep in self else (Sourced(), Sourced(), self)

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> "Sourced":
        if not old:
            return Sourced(super().replace(old, new, count))
        return Sourced.join(Sourced(new, own_of(new)), self.split(old, count))

    def join(self, parts: Iterable[str], /) -> "Sourced":
        found = list(parts)
        return Sourced(super().join(found), self._own.join(map(own_of, found)))

    def _located(self, parts: list[str], sep: str | None) -> list["Sourced"]:
        """`parts` of this text, which `sep` (None: white space) separates, as slices of it."""
        found, at = [], 0
        for part in parts:
            at = self.find(part, at)
            found.append(self[at : at + len(part)])
            at += len(part) + len(sep or "")
        return found

    def _parted(self, at: int, size: int) -> tuple["Sourced", "Sourced", "Sourced"]:
        return self[:at], self[at : at + size], self[at + size :]


def own_of(text: str) -> bytes:
    """One byte per character: `OWN` where a template wrote it; all `GIVEN` for a plain str."""
    return text._own if isinstance(text, Sourced) else GIVEN * len(text)


def written(value: Any) -> Any:
    """A constant of a template with all its texts, nested ones included, marked as the template's own."""
    if isinstance(value, str):
        return Sourced(value, OWN * len(value)) if type(value) in (str, Sourced) else value
    if isinstance(value, dict):
        return {written(key): written(part) for key, part in value.items()}
    return type(value)(map(written, value)) if type(value) in (list, tuple) else value


def join(parts: Iterable[Any]) -> Sourced:
    """The texts of all parts, one after the other."""
    texts = [part if isinstance(part, str) else str(part) for part in parts]
    return Sourced("".join(texts), b"".join(map(own_of, texts)))


def inherit(result: Any, *sources: Any) -> Any:
    """The result of a function that does not know `Sourced`: marked as the template's own if all its sources are."""
    plain = isinstance(result, str) and type(result).__name__ != "Markup" and GIVEN in own_of(result)
    return written(result) if plain and _all_own(sources) else result


def _all_own(sources: Iterable[Any]) -> bool:
    todo = list(sources)
    found = False
    while todo:
        source = todo.pop()
        if isinstance(source, str):
            if GIVEN in own_of(source):
                return False
            found = True
        elif isinstance(source, Mapping):
            todo += [*source.keys(), *source.values()]
        elif isinstance(source, list | tuple):
            todo += source
        elif source is not None and not isinstance(source, bool):
            return False  # numbers too: what they spell may come from a message
    return found
