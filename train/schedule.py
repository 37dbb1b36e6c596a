"""Learning rate schedules: pure functions of step and total steps, so that resuming needs no state."""

import math

from train.config import ScheduleConfig


def rate(schedule: ScheduleConfig, step: int, total: int) -> float:
    """The factor of the peak learning rate at `step` (from 0 on) of `total` steps.

    All kinds rise linearly over warmup_steps to 1, reached at step warmup_steps - 1. Then
    - cosine falls to final_fraction, reached at the last step;
    - wsd (warmup, stable, decay; Hu et al. 2024, arXiv 2404.06395) stays at 1 and falls linearly to
      final_fraction over the last decay_fraction of all steps;
    - constant stays at 1.

    A warmup longer than the run is shortened to the run.
    """
    warmup = min(schedule.warmup_steps, total)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.kind == "constant":
        return 1.0
    last = total - 1
    if schedule.kind == "cosine":
        start = max(warmup - 1, 0)
        progress = (step - start) / max(last - start, 1)
        shape = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    else:
        decay_steps = max(min(round(schedule.decay_fraction * total), total - warmup), 1)
        shape = min(1.0, max(last - step, 0) / decay_steps)
    return schedule.final_fraction + (1 - schedule.final_fraction) * shape
