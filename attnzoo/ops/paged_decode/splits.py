"""How the slots of a compressed cache are divided among the programs of a kernel."""

from dataclasses import dataclass

PROGRAMS = 4
"""Useful number of programs per multiprocessor: with fewer, its memory pipes are empty while one waits."""
LEAST_BLOCKS = 2
"""Fewest blocks of slots per program: with fewer, the partial results are no longer small beside the data read."""


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
    """prefix, tail: numbers of blocks of slots. rows: groups of programs in any case (sequences, kv heads, queries)."""
    wanted = -(-(prefix + tail) * rows // (PROGRAMS * multiprocessors))
    blocks = max(least, wanted)
    return Splits(blocks=blocks, prefix=-(-prefix // blocks), tail=-(-tail // blocks))
