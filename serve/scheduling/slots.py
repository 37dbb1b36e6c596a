"""Assigns sequences to slots of the batched model state, with integers only.

The n running sequences fill slots [0, n): first those that decode, then those whose prompts are being read, so that a
decode step is a slice of the state. When a sequence leaves, at most two rows are copied; when a prompt ends, at most
two rows are exchanged.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Release:
    """How to release a slot of the state: copy rows (source, target) in this order, then empty the row `freed`."""

    moves: tuple[tuple[int, int], ...]
    freed: int


class SlotTable:
    """The slots of one group. ids: requests by slot. decoding: number of decoding sequences, in the first slots; the
    sequences whose prompts are being read follow in any order."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.ids: list[str] = []
        self.decoding = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def free(self) -> int:
        """Number of empty slots."""
        return self.capacity - len(self.ids)

    def take(self, request_id: str) -> int:
        """Gives the first empty slot to a new sequence, and returns it."""
        assert self.free > 0, "no free slot"
        self.ids.append(request_id)
        return len(self.ids) - 1

    def slot_of(self, request_id: str) -> int:
        """The slot of a running sequence. Raises ValueError when it is not running."""
        return self.ids.index(request_id)

    def promote(self, ended: Sequence[str]) -> list[tuple[int, int]]:
        """Makes sequences decode whose prompts have ended; returns the pairs of slots to exchange, in order."""
        pairs = []
        for request_id in ended:
            slot = self.slot_of(request_id)
            assert slot >= self.decoding, "decodes already"
            if slot != self.decoding:
                pairs.append((self.decoding, slot))
                self.ids[slot], self.ids[self.decoding] = self.ids[self.decoding], self.ids[slot]
            self.decoding += 1
        return pairs

    def release(self, request_id: str) -> Release:
        """Removes a sequence and closes the gap; returns the row copies that this needs."""
        hole = self.slot_of(request_id)
        moves: list[tuple[int, int]] = []
        if hole < self.decoding:
            self.decoding -= 1
            hole = self._move(self.decoding, hole, moves)
        hole = self._move(len(self.ids) - 1, hole, moves)
        self.ids.pop()
        return Release(tuple(moves), freed=hole)

    def _move(self, source: int, target: int, moves: list[tuple[int, int]]) -> int:
        """Moves the sequence in `source` to the hole `target`; returns the new hole."""
        if source != target:
            moves.append((source, target))
            self.ids[target] = self.ids[source]
        return source
