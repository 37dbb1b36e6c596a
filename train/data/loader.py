"""Training batches in an order that depends only on the seed, not on the number of processes or on restarts."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
import torch

from train.data.base import Batch


class EpochStream(ABC):
    """An endless stream of training batches that visits all rows in every epoch, each time in another order.

    Two integers are the position in the stream. A subclass sets its fields before it calls `__init__`.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._epoch, self._used = 0, 0
        self._rows = self._drawn()

    def _drawn(self) -> np.ndarray:
        return self.epoch(np.random.default_rng((self._seed, self._epoch)))

    @abstractmethod
    def epoch(self, random: np.random.Generator) -> np.ndarray:
        """The rows of an epoch by number, in the order of visit."""

    @abstractmethod
    def batch(self, rows: np.ndarray) -> Batch:
        """The batch of some rows of `epoch`."""

    @abstractmethod
    def too_few(self, wanted: int, rows: int) -> str:
        """A message that says that a global batch takes `wanted` rows, and an epoch has fewer."""

    def next(self, batch_size: int, rank: int, world: int) -> Batch:
        """The batch of process `rank`: its part of the next batch_size * world rows.

        Rows at the end of an epoch that do not fill a global batch are left out. Raises ValueError if an epoch has
        fewer rows than a global batch, for a rank outside the world, and for an empty batch.
        """
        if batch_size < 1 or not 0 <= rank < world:
            raise ValueError(
                f"batch_size={batch_size}, rank={rank}, world={world}: a batch takes at least 1 row, and a rank is "
                "between 0 and world - 1"
            )
        wanted = batch_size * world
        if self._used + wanted > len(self._rows):
            self._epoch, self._used = self._epoch + 1, 0
            self._rows = self._drawn()
            if wanted > len(self._rows):
                raise ValueError(self.too_few(wanted, len(self._rows)))
        first = self._used + rank * batch_size
        self._used += wanted
        return self.batch(self._rows[first : first + batch_size])

    def state(self) -> dict[str, int]:
        """The position in the stream."""
        return {"epoch": self._epoch, "used": self._used}

    def load(self, state: Mapping[str, int]) -> None:
        """Continues from a position that `state` has returned."""
        self._epoch, self._used = int(state["epoch"]), int(state["used"])
        self._rows = self._drawn()


class BatchStream(EpochStream):
    """Batches (tokens_BT, targets_BT), int64, of a token array.

    Every epoch cuts the tokens, taken as a ring, into blocks from a random offset on. So the blocks' edges differ
    between epochs, and all epochs have equally many blocks.
    """

    def __init__(self, tokens: np.ndarray, length: int, seed: int) -> None:
        self._tokens, self._length = tokens, length
        super().__init__(seed)

    def epoch(self, random: np.random.Generator) -> np.ndarray:
        """The start of each block."""
        size = len(self._tokens)
        offset = int(random.integers(size))
        starts: np.ndarray = (offset + self._length * random.permutation(size // self._length)) % size
        return starts

    def batch(self, rows: np.ndarray) -> Batch:
        """Blocks, and the tokens that follow each of theirs."""
        block = torch.from_numpy(np.stack([self._block(start) for start in rows]).astype(np.int64))
        return block[:, :-1], block[:, 1:]

    def too_few(self, wanted: int, rows: int) -> str:
        """Advice for a small corpus."""
        return (
            f"one global batch takes {wanted} blocks of {self._length} tokens and the corpus has {rows}; use a smaller "
            "batch, shorter sequences or more text"
        )

    def _block(self, start: int) -> np.ndarray:
        """The tokens of a block and the one after it."""
        end = start + self._length + 1
        row = self._tokens[start:end]
        if end <= len(self._tokens):
            return row
        return np.concatenate([row, self._tokens[: end - len(self._tokens)]])
