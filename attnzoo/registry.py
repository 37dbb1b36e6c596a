"""A name for each thing that can be chosen by configuration."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

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

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that enters an object under `name` and returns it unchanged.

        Raises ValueError when the name is taken: two variants of one name would make configs ambiguous.
        """

        def enter(item: T) -> T:
            if name in self._items:
                raise ValueError(f"{self.kind} name {name!r} is taken by {self._items[name]!r}; choose another name")
            self._items[name] = item
            return item

        return enter

    def get(self, name: str) -> T:
        """The object registered under `name`. Raises ValueError that lists the known names."""
        if name not in self._items:
            raise ValueError(f"unknown {self.kind} {name!r}{suggest(name, self._items)}")
        return self._items[name]

    def name_of(self, item: T) -> str:
        """The name under which `item` was registered. Raises ValueError when it was not."""
        for name, known in self._items.items():
            if known is item:
                return name
        raise ValueError(f"{item!r} is not a registered {self.kind}")

    def names(self) -> list[str]:
        """Registered names in order of registration."""
        return list(self._items)

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __contains__(self, name: object) -> bool:
        return name in self._items
