"""What training needs of its data, wherever it comes from."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

IGNORED = -100
"""A target that does not count."""


class Batches(Protocol):
    """An endless stream of training batches, the same for any number of processes, resumable to the exact batch."""

    def next(self, batch_size: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
        """(tokens_BT, targets_BT) of process `rank`: its part of the next batch_size * world sequences."""

    def state(self) -> dict[str, int]:
        """Where the stream stands."""

    def load(self, state: Mapping[str, int]) -> None:
        """Continues from a `state`."""


class TrainingData(Protocol):
    """Training batches and validation blocks; targets of -100 do not count. Bytes are those of UTF-8."""

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
        """Of all that is trained and measured on: another one means other data."""

    @property
    def account(self) -> dict[str, Any]:
        """What became of the files and documents of the source (`train.data.account`); empty for generated data."""

    def validation_blocks(self, most: int | None = None) -> tuple[Tensor, Tensor]:
        """(tokens_NT, targets_NT) of all validation sequences, or of `most` of them."""

    def bytes_per_token(self, targets_NT: Tensor) -> float:
        """Bytes of text a target that counts."""
