"""Bounds on the size of a chat template's values while it renders, checked for `attnzoo.tokenizer.sandbox`."""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import GeneratorType
from typing import Any

from jinja2.runtime import Undefined
from jinja2.utils import Namespace

MAX_CHARS = 4 << 20
"""Largest number of characters of one value of a template, and of its output."""
MAX_TOTAL = 512 << 20
"""Largest number of bytes of all values of one rendering together, because a template may keep them all."""
MAX_BITS, MAX_DEPTH, MAX_WIDTH = 4096, 64, 1000
NODE = 16
"""Characters that an element of a list counts for."""

CONTAINERS: Any = (dict, list, tuple, set, frozenset, type({}.keys()), type({}.values()), type({}.items()))
SIZED = frozenset(["batch", "center", "indent", "ljust", "rjust", "round", "slice", "tojson", "zfill"])
"""Methods and filters whose numeric arguments are sizes."""
PARAMETERS = {
    "replace": ("old", "new"),
    "indent": ("width",),
    "sum": ("attribute", "start"),
    "join": ("d", "attribute"),
}

_PERCENT = re.compile(r"%(?:\([^)]*\))?([-#0 +]*[\d*]*(?:\.[\d*]*)?)")
_BRACES = re.compile(r"\{[^{}:]*:([^{}]*)\}")
_NESTED_BRACES = re.compile(r"\{[^{}]*\{")


class LimitError(ValueError):
    """A value of the template would be too large."""


class Guard:
    """Checks the bounds of one rendering."""

    def __init__(self, chars: int = MAX_CHARS, total: int = MAX_TOTAL) -> None:
        self.chars, self.left, self.total = chars, total, total

    def room(self, chars: int) -> None:
        """Raises LimitError for more characters than a value may have."""
        if chars > self.chars:
            raise LimitError(f"one of its values is larger than {self.chars} characters")

    def made(self, value: Any) -> Any:
        """`value`, once its size is checked; a generator checks each of its values. Raises LimitError."""
        size = self.measure(value)
        self.left -= 4 * size + NODE if isinstance(value, CONTAINERS) else sys.getsizeof(value)
        if self.left < 0:
            raise LimitError(f"its values are larger than {self.total} bytes in total")
        return self._each(value) if isinstance(value, GeneratorType) else value

    def _each(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            yield self.made(value)

    def measure(self, value: Any) -> int:
        """Number of characters of a value, nested values included. Raises LimitError."""
        size = 0
        todo: list[tuple[Any, int]] = [(value, 0)]
        while todo:
            item, depth = todo.pop()
            if isinstance(item, str | bytes):
                size += len(item)
            elif isinstance(item, int):
                if item.bit_length() > MAX_BITS:
                    raise LimitError(f"one of its numbers has more than {MAX_BITS} bits")
            elif isinstance(item, CONTAINERS):
                if depth == MAX_DEPTH:
                    raise LimitError(f"one of its values has more than {MAX_DEPTH} levels")
                size += NODE * len(item)
                self.room(size)
                todo += [(part, depth + 1) for part in item]
                if isinstance(item, dict):
                    todo += [(part, depth + 1) for part in item.values()]
            elif isinstance(item, Namespace) and depth:
                raise LimitError("it holds a namespace in another value, whose size has no bound")
            self.room(size)
        return size

    def joined(self, parts: Iterable[Any], separator: str = "") -> list[Any]:
        """`parts` as a list, once there is room for all their text."""
        found: list[Any] = []
        size = 0
        for part in parts:
            found.append(part)
            size += self.measure(part) + len(separator) + 1
            self.room(size)
        return found

    def operands(self, operator: str, left: Any, right: Any) -> None:
        """Raises LimitError where the result of a binary operator would be too large."""
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | bytes | list | tuple) and isinstance(times, int):
                    self.room(max(times, 0) * max(self.measure(value), 1))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if abs(left) > 1 and right * left.bit_length() > MAX_BITS:
                raise LimitError(f"one of its numbers has more than {MAX_BITS} bits")
        elif operator == "%" and isinstance(left, str):
            self.percent(left, right)

    def percent(self, text: str, values: Any) -> None:
        """Raises LimitError where `text % values` would be too large."""
        specs = _PERCENT.findall(text)
        if any("*" in spec for spec in specs):
            raise LimitError("a format whose width is one of its arguments")
        # Every value of a tuple is used once; a mapping's values may be used by every field.
        once = isinstance(values, tuple)
        self._fields(text, specs, self.measure(values) * (1 if once else text.count("%")))

    def braces(self, text: str, values: Sequence[Any]) -> None:
        """Raises LimitError where `text.format(*values)` would be too large."""
        plain = text.replace("{{", "")
        if _NESTED_BRACES.search(plain):
            raise LimitError("a format whose width is one of its arguments")
        self._fields(text, _BRACES.findall(plain), text.count("{") * max(map(self.measure, values), default=0))

    def _fields(self, text: str, specs: Iterable[str], size: int) -> None:
        widths = [digits.lstrip("0") or "0" for spec in specs for digits in re.findall(r"[0-9]+", spec)]
        if any(len(digits) > 4 or int(digits) > MAX_WIDTH for digits in widths):
            raise LimitError(f"a format with a width of more than {MAX_WIDTH}")
        self.room(len(text) + size + MAX_WIDTH * len(widths))

    def method(self, name: str, text: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """The arguments for a method of `text`, once its result is known to fit."""
        if name == "join" and len(args) == 1:
            return (self.joined(args[0], text),)
        self._sizes(name, (*args, *kwargs.values()))
        if name == "replace":
            self._replace(text, _options(name, args, kwargs))
        return args

    def filter(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """The arguments for a filter, its value first, once its result is known to fit."""
        value, rest = args[0], args[1:]
        options = _options(name, rest, kwargs)
        self._sizes(name, (*rest, *kwargs.values()))
        if name == "join":
            return (self.joined(value, str(options.get("d", ""))), *rest)
        if name == "replace" and not isinstance(value, Undefined):
            self._replace(str(value), options)
        elif name == "indent" and isinstance(value, str):
            width = options.get("width", 4)
            each = width if isinstance(width, int) else len(str(width))
            self.room(len(value) + each * (1 + len(value.splitlines())))
        elif name == "format":
            self.percent(str(value), dict(kwargs) if kwargs else rest)
        elif name == "sum" and not isinstance(options.get("start", 0), int | float):
            raise LimitError("a sum of anything but numbers")
        return args

    def _sizes(self, name: str, values: Iterable[Any]) -> None:
        if name in SIZED:
            for value in values:
                if isinstance(value, int) and abs(value) > MAX_WIDTH:
                    raise LimitError(f"{name} with a size of more than {MAX_WIDTH}")
                if name in ("indent", "tojson") and self.measure(value) > MAX_WIDTH:
                    raise LimitError(f"{name} with more than {MAX_WIDTH} characters between lines")

    def _replace(self, text: str, options: Mapping[str, Any]) -> None:
        old, new = str(options.get("old", "")), str(options.get("new", ""))
        self.room(len(text) + text.count(old) * max(len(new) - len(old), 0))


def _options(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {**dict(zip(PARAMETERS.get(name, ()), args, strict=False)), **kwargs}
