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
    """Mean loss of a token in nats, as bits for each byte of text: comparable over tokenizers."""
    return loss_nats / math.log(2) / bytes_per_token


class Validation(NamedTuple):
    """Mean loss of a target in nats, and the same as bits for each byte of the text behind these targets."""

    loss: float
    bits_per_byte: float


UNMEASURED = Validation(math.nan, math.nan)


def passes(blocks: int, batch_size: int, world: int) -> int:
    """Passes of each rank in an evaluation over that many blocks."""
    return math.ceil(math.ceil(blocks / batch_size) / world)


def validate(
    engine: TrainingEngine,
    data: TrainingData,
    batch_size: int,
    most_blocks: int | None,
    go_on: Callable[[], bool] = lambda: True,
) -> Validation | None:
    """Loss over the validation blocks; `most_blocks`: over that many, spread evenly.

    go_on: asked after every pass on every rank, which must all get the same answer; False gives the evaluation up, and
    the result is None.
    """
    tokens_NT, targets_NT = data.validation_blocks(most_blocks)
    blocks = len(tokens_NT)
    starts = range(0, blocks, batch_size)
    count = agree(lambda: _count(targets_NT))
    total = 0.0
    with engine.evaluating():
        for i in range(engine.rank, passes(blocks, batch_size, engine.world) * engine.world, engine.world):
            # Every rank runs the same number of passes (ZeRO 3 gathers weights in each); the surplus counts nothing.
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
    """Targets that count. Raises ValueError when there are none."""
    count = int((targets_NT != IGNORED).sum())
    if count == 0:
        raise ValueError(
            f"none of {len(targets_NT)} validation sequences has a target that counts: there is nothing to measure"
        )
    return count


def samples(engine: TrainingEngine, tokenizer: Tokenizer, config: SampleConfig, seed: int) -> list[str] | None:
    """Each prompt with its continuation, on rank 0; None elsewhere. Training goes on as if there had been none."""
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
