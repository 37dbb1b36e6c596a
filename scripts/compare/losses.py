"""Measures a model's loss, bits per character and accuracy on a text, by position in windows."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.models import DecoderLM
from scripts.compare.segments import Form, segment_forward
from scripts.compare.text import streams, windows


@dataclass(frozen=True)
class Losses:
    """Sums over all windows by position in the window: losses in nats, correct predictions, and targets."""

    nats_T: Tensor
    right_T: Tensor
    count_T: Tensor

    @property
    def loss(self) -> float:
        """Mean loss in nats per character."""
        return float(self.nats_T.sum() / self.count_T.sum())

    @property
    def bits_per_character(self) -> float:
        """Mean loss in bits per character."""
        return self.loss / math.log(2)

    @property
    def accuracy(self) -> float:
        """Fraction of characters that were predicted as most likely."""
        return float(self.right_T.sum() / self.count_T.sum())

    def between(self, start: int, end: int) -> float:
        """Mean loss in nats at positions start..end-1; NaN if no window is that long."""
        count = self.count_T[start:end].sum()
        return float(self.nats_T[start:end].sum() / count) if count else math.nan


def count(logits_BTV: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(losses nats_BT, correctness right_BT) of predictions, float64."""
    nats_BT = F.cross_entropy(logits_BTV.transpose(1, 2).float(), targets_BT, reduction="none")
    return nats_BT.double(), (logits_BTV.argmax(-1) == targets_BT).double()


@torch.no_grad()
def window_losses(model: DecoderLM, ids: Tensor, length: int, chunk: int, batch: int) -> Losses:
    """Losses in consecutive windows of `length` characters. Each begins with an empty state, carried between chunks."""
    nats_T, right_T, count_T = (torch.zeros(length, dtype=torch.float64) for _ in range(3))
    for tokens_BT, targets_BT in windows(ids, length, batch):
        rows, reach = tokens_BT.shape
        state = model.init_state(rows, reach)
        for start in range(0, reach, chunk):
            place = slice(start, min(start + chunk, reach))
            logits_BTV, state = model.extend(tokens_BT[:, place], state)
            nats_BT, right_BT = count(logits_BTV, targets_BT[:, place])
            nats_T[place] += nats_BT.sum(0)
            right_T[place] += right_BT.sum(0)
            count_T[place] += rows
    return Losses(nats_T, right_T, count_T)


@torch.no_grad()
def segment_losses(model: DecoderLM, ids: Tensor, batch: int, segment: int, keep: int, form: Form) -> Losses:
    """Losses on the whole text, read once in `batch` parallel streams of segments with a memory of `keep` states
    (`segment_forward`)."""
    nats_T, right_T, count_T = (torch.zeros(segment, dtype=torch.float64) for _ in range(3))
    memory = model.init_memory(batch, keep)
    reader = streams(ids, batch, segment)
    for _ in range(max(1, len(ids) // (batch * segment))):
        tokens_BT, targets_BT = next(reader)
        logits_BTV, memory = segment_forward(model, tokens_BT, memory, form)
        nats_BT, right_BT = count(logits_BTV, targets_BT)
        nats_T += nats_BT.sum(0)
        right_T += right_BT.sum(0)
        count_T += batch
    return Losses(nats_T, right_T, count_T)
