"""Which sequence lives in which slot of the batched model state: integers only.

Running sequences are compact in slots [0, n), and those that decode stand before those whose prompt is still being
read, so that a decode step is a plain slice of the state. Both survive every departure by at most two row copies, and
every end of a prompt by at most one exchange.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Release:
    """What a departure does to the state: copy rows (source, target) in this order, then empty the row `freed`."""

    moves: tuple[tuple[int, int], ...]
    freed: int


class SlotTable:
    """Slots by position. `decoding`: how many of the first slots hold sequences that decode; behind them are those
    whose prompts are being read, in any order."""

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
        """Gives the first empty slot to a sequence that starts its prompt."""
        assert self.free > 0, "no free slot"
        self.ids.append(request_id)
        return len(self.ids) - 1

    def slot_of(self, request_id: str) -> int:
        """The slot of a running sequence. Raises ValueError when it is not running."""
        return self.ids.index(request_id)

    def promote(self, ended: Sequence[str]) -> list[tuple[int, int]]:
        """These sequences, whose prompts end, decode from now on: they stand behind those that do already, in this
        order. Returns the pairs of slots to be exchanged, one pair after the other."""
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
        """Removes a sequence and closes the gap."""
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
