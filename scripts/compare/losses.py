"""What a model says of a text: loss, bits per character and accuracy, by position in windows from a fresh state."""

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
    """Sums over all windows for each position in the window: nats, right guesses, targets."""

    nats_T: Tensor
    right_T: Tensor
    count_T: Tensor

    @property
    def loss(self) -> float:
        """Mean nats a character."""
        return float(self.nats_T.sum() / self.count_T.sum())

    @property
    def bits_per_character(self) -> float:
        """Mean bits a character."""
        return self.loss / math.log(2)

    @property
    def accuracy(self) -> float:
        """Share of characters that were the most likely one."""
        return float(self.right_T.sum() / self.count_T.sum())

    def between(self, start: int, end: int) -> float:
        """Mean nats of positions start..end-1; NaN where no window is that long."""
        count = self.count_T[start:end].sum()
        return float(self.nats_T[start:end].sum() / count) if count else math.nan


def count(logits_BTV: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(nats_BT, right_BT) of predictions."""
    nats_BT = F.cross_entropy(logits_BTV.transpose(1, 2).float(), targets_BT, reduction="none")
    return nats_BT.double(), (logits_BTV.argmax(-1) == targets_BT).double()


@torch.no_grad()
def window_losses(model: DecoderLM, ids: Tensor, length: int, chunk: int, batch: int) -> Losses:
    """Windows of `length` end to end, each from a fresh state, its state carried from chunk to chunk."""
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
    """The text once in segments with a memory, as `segment_forward` does it, in `batch` streams side by side."""
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
