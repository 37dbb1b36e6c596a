"""Metrics on the validation data over all ranks, and text samples."""

import math
from collections.abc import Callable

import torch
from torch import nn

from attnzoo.report import counted
from train.engine import TrainingEngine
from train.random_state import random_state, set_random_state
from train.ranks import agree, gather
from train.tasks import Task


def passes(rows: int, batch_size: int, world: int) -> int:
    """Number of passes of each rank in an evaluation of `rows` rows."""
    return math.ceil(math.ceil(rows / batch_size) / world)


def validate(
    engine: TrainingEngine, batch_size: int, most: int | None, go_on: Callable[[], bool] = lambda: True
) -> dict[str, float] | None:
    """Measures the task's metrics on the validation rows. most: on so many, spread evenly (None: all).

    go_on: called after every pass, and must return the same on every rank; False ends the evaluation, and the result is
    None. Raises AgreedError if no target counts.
    """
    task = engine.task
    batch = task.validation(most)
    rows, found = len(batch[0]), {}
    starts = range(0, rows, batch_size)
    agree(lambda: _check_targets(task, batch))
    with engine.evaluating():
        for i in range(engine.rank, passes(rows, batch_size, engine.world) * engine.world, engine.world):
            # Every rank must run equally many passes (ZeRO 3 gathers weights in each); surplus ones do not count.
            start = starts[i] if i < len(starts) else 0
            part = engine.measure(tuple(tensor[start : start + batch_size] for tensor in batch))
            if i < len(starts):
                found[i] = part
            if not go_on():
                return None
    everywhere = {i: part for parts in gather(found) for i, part in parts.items()}
    return task.metrics(batch, torch.cat([everywhere[i] for i in range(len(starts))]))


def validate_alone(task: Task, model: nn.Module, batch_size: int) -> dict[str, float]:
    """The task's metrics of a whole model on all validation rows, on the CPU of this rank alone."""
    batch = task.validation()
    with torch.no_grad():
        parts = [
            task.measure(model, tuple(tensor[start : start + batch_size] for tensor in batch))
            for start in range(0, len(batch[0]), batch_size)
        ]
    return task.metrics(batch, torch.cat(parts))


def _check_targets(task: Task, batch: tuple[torch.Tensor, ...]) -> None:
    """Raises ValueError if no target counts."""
    if task.count(batch) == 0:
        raise ValueError(
            f"none of {counted(len(batch[0]), f'validation {task.ROW}')} has a target that counts: there is nothing to "
            "measure"
        )


def samples(engine: TrainingEngine, seed: int) -> list[str] | None:
    """The task's text samples, on rank 0; None on other ranks. The random states are restored."""
    before = random_state()
    try:
        with engine.evaluating():
            model = engine.full_model() if engine.stage == 3 else (engine.model if engine.rank == 0 else None)
            texts = None if model is None else engine.task.samples(model, seed)
            engine.barrier()
            return texts
    finally:
        set_random_state(before)
