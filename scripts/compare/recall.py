"""Training batches, test sequences and accuracy of the recall task."""

from collections.abc import Iterator

import torch
from torch import Tensor

from attnzoo.tasks.recall import IGNORED, recall_batch
from scripts.compare.config import RecallConfig


def recall_batches(config: RecallConfig, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields training batches without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield recall_batch(config, config.batch_size, generator)


def held_out(config: RecallConfig) -> tuple[Tensor, Tensor]:
    """The test sequences, the same for all variants and seeds."""
    return recall_batch(config, config.test_sequences, torch.Generator().manual_seed(2**31 - 1))


@torch.no_grad()
def recall_accuracy(model: torch.nn.Module, config: RecallConfig) -> float:
    """Fraction of the held-out questions whose value is the most likely token."""
    tokens_BT, targets_BT = held_out(config)
    asked_BT = targets_BT != IGNORED
    right = 0
    for tokens, targets, asked in zip(
        *(t.split(config.batch_size) for t in (tokens_BT, targets_BT, asked_BT)), strict=True
    ):
        right += int((model(tokens).argmax(-1) == targets)[asked].sum())
    return right / int(asked_BT.sum())
