"""Protocols of training data, whatever its source."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

IGNORED = -100
"""A target that does not count for the loss."""
Batch = tuple[Tensor, ...]
"""The tensors of a batch. The first axis of each is that of the batch's rows: sequences, stays, images."""


class Batches(Protocol):
    """An endless stream of training batches: the same for any number of processes, and resumable exactly."""

    def next(self, batch_size: int, rank: int, world: int) -> Batch:
        """The batch of process `rank`: its part of the next batch_size * world rows."""

    def state(self) -> dict[str, int]:
        """The position in the stream."""

    def load(self, state: Mapping[str, int]) -> None:
        """Continues from a position that `state` has returned."""


class TextData(Protocol):
    """Training batches (tokens_BT, targets_BT), int64, and validation blocks. Targets of -100 do not count. Bytes are
    those of the text in UTF-8."""

    @property
    def train(self) -> Batches: ...
    @property
    def sequence_length(self) -> int: ...
    @property
    def num_train_tokens(self) -> int: ...
    @property
    def num_train_bytes(self) -> int: ...
    @property
    def digest(self) -> str:
        """A digest of the training and validation data."""

    @property
    def account(self) -> dict[str, Any]:
        """The counts of the source's files and documents (`train.data.account`); empty for generated data."""

    def validation_blocks(self, most: int | None = None) -> tuple[Tensor, Tensor]:
        """(tokens_NT, targets_NT), int64, of all validation sequences, or of `most` of them."""

    def bytes_per_token(self, targets_NT: Tensor) -> float:
        """Mean number of bytes of text for each target that counts."""
