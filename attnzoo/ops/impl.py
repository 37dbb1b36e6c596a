"""How an operation's implementation is chosen: explicitly, and never by a silent fallback."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from attnzoo.errors import suggest

Impl = Literal["auto", "reference", "torch"]


def choose(operation: str, impl: Impl, known: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The implementation named `impl`; "auto" is the fast path of the device, today "torch" everywhere.

    Raises ValueError for a name this operation does not have.
    """
    name = "torch" if impl == "auto" else impl
    if name not in known:
        raise ValueError(f"{operation} has no implementation {impl!r}{suggest(impl, [*known, 'auto'])}")
    return known[name]
