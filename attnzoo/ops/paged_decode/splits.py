"""How the slots of a compressed cache are shared out over programs, in integers."""

from dataclasses import dataclass

PROGRAMS = 4
"""Programs a multiprocessor that are worth having: fewer leave its memory pipes empty while one waits."""
LEAST_BLOCKS = 2
"""Blocks of slots a program: below, what is written for the combination is no longer small beside what is read."""


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Every program takes `blocks` blocks of one segment; the first `prefix` programs those of the prefix."""

    blocks: int
    prefix: int
    tail: int

    @property
    def total(self) -> int:
        return self.prefix + self.tail


def plan_splits(prefix: int, tail: int, *, rows: int, multiprocessors: int, least: int = LEAST_BLOCKS) -> Splits:
    """`prefix`, `tail`: blocks of slots; `rows`: groups of programs there are anyway (sequences, kv heads, queries)."""
    wanted = -(-(prefix + tail) * rows // (PROGRAMS * multiprocessors))
    blocks = max(least, wanted)
    return Splits(blocks=blocks, prefix=-(-prefix // blocks), tail=-(-tail // blocks))
