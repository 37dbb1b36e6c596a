"""`--dry-run`: describes a run's sizes and memory without starting it."""

from torch import nn

from attnzoo.report import counted
from train.deepspeed_config import deepspeed_config
from train.tasks import Task


def describe(task: Task, model: nn.Module, world: int) -> str:
    """The resolved configuration, the sizes of a model (without storage), and the memory of a rank, as text."""
    config, train, each = task.config, task.config.train, task.units_per_row
    rows = counted(train.batch_size, task.ROW) + (f" of {each}" if each > 1 else "")
    accumulation = deepspeed_config(config, world)["gradient_accumulation_steps"]
    weights, memory = task.plan(model, world)
    passes = f"{counted(world, 'rank')} x {counted(accumulation, 'pass', 'passes')} of {train.micro_batch_size}"
    return "\n".join(
        [
            config.to_yaml().rstrip(),
            "",
            f"parameters: {weights}",
            f"{task.UNIT}s per step: {train.batch_size * each:,} = {rows}, {passes}",
            memory,
        ]
    )
