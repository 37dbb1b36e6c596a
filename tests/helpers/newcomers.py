"""Variants from outside the tree, for as long as a test needs them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attnzoo.attention import ATTENTION, load_plugins

NEWCOMERS = Path(__file__).resolve().parents[1] / "contract" / "newcomers"


@contextmanager
def newcomer(kind: str) -> Iterator[str]:
    """A variant of tests/contract/newcomers, registered inside and forgotten after."""
    with plugged_in(NEWCOMERS / f"{kind}.py", kind):
        yield kind


@contextmanager
def plugged_in(path: Path, kind: str) -> Iterator[None]:
    """The variant in a file, registered inside and forgotten after: the file may then be changed."""
    before = set(sys.modules)
    load_plugins(str(path))
    try:
        yield
    finally:
        ATTENTION.remove(kind)
        for name in set(sys.modules) - before:
            if name.startswith("attnzoo_plugin_"):
                del sys.modules[name]
