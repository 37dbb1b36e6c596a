"""Registries: names for the classes that a configuration can choose."""

import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from attnzoo.errors import suggest

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to classes (or other objects) of one kind.

    >>> COLOURS: Registry[type] = Registry("colour")
    >>> @COLOURS.register("red")
    ... class Red: ...
    >>> COLOURS.get("red") is Red
    True
    """

    def __init__(self, kind: str, check: Callable[[str, T], None] | None = None) -> None:
        """kind: names the entries in messages. check(name, item): raises ValueError to refuse an object."""
        self.kind = kind
        self._items: dict[str, T] = {}
        self._check = check
        self._adapt: Callable[[Any], T] | None = None
        self._pending: Callable[[], None] | None = None
        self._lock = threading.RLock()

    def load_first(self, load: Callable[[], None]) -> None:
        """Calls `load`, which registers more objects, at the first look-up. Its errors thus reach the caller of that
        look-up, and importing a module cannot fail. After a failure `load` is called again at the next look-up."""
        self._pending = load

    def adapt_by(self, adapt: Callable[[Any], T]) -> None:
        """What is registered from now on is entered as `adapt(item)`."""
        self._adapt = adapt

    @property
    def _loaded(self) -> dict[str, T]:
        with self._lock:  # a second thread waits for what the first one loads
            pending, self._pending = self._pending, None
            if pending is not None:
                try:
                    pending()
                except BaseException:
                    self._pending = pending
                    raise
            return self._items

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that registers an object under `name` and returns it unchanged.

        Raises ValueError for a name that is taken or is not one word, and for an object that `check` refuses.
        """
        if not isinstance(name, str) or not re.fullmatch(r"[\w+.-]+", name):
            raise ValueError(
                f"{self.kind} name {name!r}: give a word without spaces, as it stands in configurations: "
                '@register("name")'
            )

        def enter(item: T) -> T:
            entry = item
            if self._adapt is not None:
                try:
                    entry = self._adapt(item)
                except ValueError as error:
                    raise ValueError(f"{self.kind} {name!r}: {error}") from None
            if self._check is not None:
                self._check(name, entry)
            if name in self._items:
                raise ValueError(f"{self.kind} name {name!r} is taken by {_place(self._items[name])}; choose another")
            self._items[name] = entry
            return item

        return enter

    def get(self, name: str) -> T:
        """The object registered under `name`. Raises ValueError that lists the known names."""
        if not isinstance(name, str) or name not in self._loaded:
            raise ValueError(f"unknown {self.kind} {name!r}{suggest(name, self._items)}")
        return self._items[name]

    def remove(self, name: str) -> None:
        """Removes a name, for example after the file that registered it has failed."""
        del self._items[name]

    def name_of(self, item: T) -> str:
        """The name under which `item` was registered. Raises ValueError when it was not."""
        for name, known in self._loaded.items():
            if known is item:
                return name
        raise ValueError(f"{item!r} is not a registered {self.kind}")

    def names(self) -> list[str]:
        """Registered names in order of registration."""
        return list(self._loaded)

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded)

    def __contains__(self, name: object) -> bool:
        return name in self._loaded


def _place(item: Any) -> str:
    """The object's name, and its file if that is known."""
    file = getattr(sys.modules.get(getattr(item, "__module__", "")), "__file__", None)
    name = getattr(item, "__qualname__", repr(item))
    return name if file is None else f"{name} in {file}"
