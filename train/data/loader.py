"""Training batches in an order that depends only on the seed, not on the number of processes or on restarts."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


class BatchStream:
    """An endless stream of training batches over a token array.

    Every epoch cuts the tokens, taken as a ring, into blocks from a random offset on, and visits them in random order.
    So the blocks' edges differ between epochs, and all epochs have equally many blocks. Two integers are the position
    in the stream.
    """

    def __init__(self, tokens: np.ndarray, length: int, seed: int) -> None:
        self._tokens, self._length, self._seed = tokens, length, seed
        self._epoch, self._used = 0, 0
        self._starts = self._epoch_starts()

    def _epoch_starts(self) -> np.ndarray:
        """The start of each block of this epoch, in the order of visit."""
        random = np.random.default_rng((self._seed, self._epoch))
        size = len(self._tokens)
        offset = int(random.integers(size))
        starts: np.ndarray = (offset + self._length * random.permutation(size // self._length)) % size
        return starts

    def _block(self, start: int) -> np.ndarray:
        """The tokens of a block and the one after it."""
        end = start + self._length + 1
        row = self._tokens[start:end]
        if end <= len(self._tokens):
            return row
        return np.concatenate([row, self._tokens[: end - len(self._tokens)]])

    def next(self, batch_size: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
        """(tokens_BT, targets_BT), int64, for process `rank`: its part of the next batch_size * world blocks.

        Blocks at the end of an epoch that do not fill a global batch are left out. Raises ValueError if the corpus has
        fewer blocks than a global batch, for a rank outside the world, and for an empty batch.
        """
        if batch_size < 1 or not 0 <= rank < world:
            raise ValueError(
                f"batch_size={batch_size}, rank={rank}, world={world}: a batch takes at least 1 block, and a rank is "
                "between 0 and world - 1"
            )
        wanted = batch_size * world
        if self._used + wanted > len(self._starts):
            self._epoch, self._used = self._epoch + 1, 0
            self._starts = self._epoch_starts()
            if wanted > len(self._starts):
                raise ValueError(
                    f"one global batch takes {wanted} blocks of {self._length} tokens and the corpus has "
                    f"{len(self._starts)}; use a smaller batch, shorter sequences or more text"
                )
        first = self._used + rank * batch_size
        self._used += wanted
        rows = [self._block(start) for start in self._starts[first : first + batch_size]]
        block = torch.from_numpy(np.stack(rows).astype(np.int64))
        return block[:, :-1], block[:, 1:]

    def state(self) -> dict[str, int]:
        """The position in the stream."""
        return {"epoch": self._epoch, "used": self._used}

    def load(self, state: Mapping[str, int]) -> None:
        """Continues from a position that `state` has returned."""
        self._epoch, self._used = int(state["epoch"]), int(state["used"])
        self._starts = self._epoch_starts()
