"""The training loops of a comparison: plain torch in one process; reproducible for a seed with one thread."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.models import DecoderLM
from attnzoo.workers import Tick
from scripts.compare.config import PaperConfig
from scripts.compare.losses import count
from scripts.compare.segments import Form, segment_forward
from scripts.compare.text import Text, streams


class Recipe(Protocol):
    """The settings that `CompareConfig` and `RecallConfig` share."""

    @property
    def steps(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def warmup_steps(self) -> int: ...


def cosine(step: int, steps: int, warmup: int) -> float:
    """The factor of the peak learning rate: linear warmup over `warmup` steps, then a cosine down to a tenth."""
    warmup = min(warmup, steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup + 1) / max(steps - warmup, 1)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def noam(step: int, warmup: int, model_dim: int) -> float:
    """The factor of the learning rate by Vaswani et al. 2017 (arXiv 1706.03762), eq. 3; `step` counts from 0."""
    return model_dim**-0.5 * min((step + 1) ** -0.5, (step + 1) * warmup**-1.5)


def train(
    model: DecoderLM,
    batches: Iterator[tuple[Tensor, Tensor]],
    recipe: Recipe,
    clip: float,
    after_step: Callable[[int], None],
) -> float:
    """Trains the parallel form with AdamW, a cosine schedule and no weight decay; returns the mean loss of the last
    tenth of the steps. after_step: called with the number of finished steps.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    losses = []
    for step in range(recipe.steps):
        optimizer.param_groups[0]["lr"] = recipe.lr * cosine(step, recipe.steps, recipe.warmup_steps)
        loss = model.loss(*next(batches))
        _update(model, loss, optimizer, clip)
        losses.append(loss.item())
        after_step(step + 1)
    last = losses[-max(1, recipe.steps // 10) :]
    return sum(last) / len(last)


@dataclass
class Accuracy:
    """The accuracy as the authors compute it: over training and validation batches together, from the first step on."""

    right: float = 0.0
    total: int = 0

    def add(self, right_BT: Tensor) -> None:
        self.right += float(right_BT.sum())
        self.total += right_BT.numel()

    @property
    def value(self) -> float:
        return self.right / self.total


def train_as_published(
    model: DecoderLM, text: Text, config: PaperConfig, form: Form, seed: int, clip: float, tick: Tick
) -> float:
    """Trains with segments and a memory, Adam and Noam's schedule; returns the accuracy as the authors compute it.

    Every nine training segments are followed by one validation segment with its own memory, as the parts of the text
    are nine to one. Both count for the accuracy.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    accuracy = Accuracy()
    training = streams(text.train, config.batch_size, config.segment, seed)
    validation = streams(text.validation, config.batch_size, config.segment, seed)
    memory = model.init_memory(config.batch_size, config.memory)
    validation_memory = memory
    for step in range(config.steps):
        optimizer.param_groups[0]["lr"] = config.lr * noam(step, config.warmup_steps, model.config.model_dim)
        tokens_BT, targets_BT = next(training)
        logits_BTV, memory = segment_forward(model, tokens_BT, memory, form)
        _update(model, F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten()), optimizer, clip)
        accuracy.add(count(logits_BTV.detach(), targets_BT)[1])
        if step % 9 == 8:
            tokens_BT, targets_BT = next(validation)
            with torch.no_grad():
                logits_BTV, validation_memory = segment_forward(model, tokens_BT, validation_memory, form)
            accuracy.add(count(logits_BTV, targets_BT)[1])
        tick()
    return accuracy.value


def _update(model: DecoderLM, loss: Tensor, optimizer: torch.optim.Optimizer, clip: float) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
