"""Validation loss over all ranks, and text samples."""

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from attnzoo.models import Sampling, generate
from attnzoo.tokenizer import Tokenizer
from train.config import SampleConfig
from train.data import IGNORED, TrainingData
from train.engine import TrainingEngine
from train.random_state import random_state, set_random_state
from train.ranks import agree


def bits_per_byte(loss_nats: float, bytes_per_token: float) -> float:
    """Converts a mean loss per token in nats to bits per byte of text, which is comparable between tokenizers."""
    return loss_nats / math.log(2) / bytes_per_token


class Validation(NamedTuple):
    """loss: mean over targets in nats. bits_per_byte: the same loss in bits per byte of the targets' text."""

    loss: float
    bits_per_byte: float


UNMEASURED = Validation(math.nan, math.nan)


def passes(blocks: int, batch_size: int, world: int) -> int:
    """Number of passes of each rank in an evaluation of `blocks` blocks."""
    return math.ceil(math.ceil(blocks / batch_size) / world)


def validate(
    engine: TrainingEngine,
    data: TrainingData,
    batch_size: int,
    most_blocks: int | None,
    go_on: Callable[[], bool] = lambda: True,
) -> Validation | None:
    """Measures the loss on the validation blocks. most_blocks: on so many, spread evenly (None: all).

    go_on: called after every pass, and must return the same on every rank; False ends the evaluation, and the result is
    None. Raises AgreedError if no target counts.
    """
    tokens_NT, targets_NT = data.validation_blocks(most_blocks)
    blocks = len(tokens_NT)
    starts = range(0, blocks, batch_size)
    count = agree(lambda: _count(targets_NT))
    total = 0.0
    with engine.evaluating():
        for i in range(engine.rank, passes(blocks, batch_size, engine.world) * engine.world, engine.world):
            # Every rank must run equally many passes (ZeRO 3 gathers weights in each); surplus ones do not count.
            surplus = i >= len(starts)
            start = 0 if surplus else starts[i]
            rows = slice(start, min(start + batch_size, blocks))
            part = float(engine.loss_sum(tokens_NT[rows], targets_NT[rows]))
            total += 0.0 if surplus else part
            if not go_on():
                return None
    (total,) = engine.sum(total)
    loss = total / count
    return Validation(loss, bits_per_byte(loss, data.bytes_per_token(targets_NT)))


def _count(targets_NT: Tensor) -> int:
    """Number of targets that count. Raises ValueError if there are none."""
    count = int((targets_NT != IGNORED).sum())
    if count == 0:
        raise ValueError(
            f"none of {len(targets_NT)} validation sequences has a target that counts: there is nothing to measure"
        )
    return count


def samples(engine: TrainingEngine, tokenizer: Tokenizer, config: SampleConfig, seed: int) -> list[str] | None:
    """Each prompt with a generated continuation, on rank 0; None on other ranks. The random states are restored."""
    before = random_state()
    try:
        with engine.evaluating():
            return _samples(engine, tokenizer, config, seed)
    finally:
        set_random_state(before)


def _samples(engine: TrainingEngine, tokenizer: Tokenizer, config: SampleConfig, seed: int) -> list[str] | None:
    model = engine.full_model() if engine.stage == 3 else (engine.model if engine.rank == 0 else None)
    texts = None
    if model is not None:
        prompts = [tokenizer.encode(prompt, bos=True) for prompt in config.prompts]
        outputs = generate(
            model,
            prompts,
            max_new_tokens=config.max_new_tokens,
            sampling=Sampling(temperature=config.temperature, top_p=config.top_p),
            seed=seed,
            stop_token=tokenizer.eos_id,
        )
        texts = [tokenizer.decode(p + out) for p, out in zip(prompts, outputs, strict=True)]
    engine.barrier()
    return texts
