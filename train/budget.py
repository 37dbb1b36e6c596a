"""`train.max_minutes` as a number of steps: an estimate from what the first steps and the first evaluation took."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class MeasuredPace:
    """Seconds measured so far.

    steps: of each step. one_pass: the median pass of the first evaluation; 0 where there was none. first_evaluation:
    all of it. elapsed: since the run began, the first evaluation and the steps among it.
    """

    steps: Sequence[float]
    one_pass: float
    first_evaluation: float
    elapsed: float


@dataclass(frozen=True, kw_only=True)
class Evaluations:
    """Passes of a rank in an evaluation on the way (after `every` steps; None: never) and in the last one.

    share: the size of a pass as a part of a step, at least one of the step's own passes.
    """

    every: int | None
    passes: int
    last_passes: int
    share: float


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What became of the budget. affordable: steps that fit into it; steps: those that the run takes.

    short: a warning in words where the budget is too small for the model to learn much; else None.
    """

    minutes: float
    min_steps: int | None
    affordable: int
    steps: int
    step_seconds: float
    expected_minutes: float
    short: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a checkpoint and a report keep them."""
        return asdict(self)


def plan_steps(options: TrainConfig, warmup: int, pace: MeasuredPace, evaluations: Evaluations) -> Budget:
    """The number of steps for `options.max_minutes`, once `pace.steps` are done.

    What has passed counts as it was, however slow: the compilation in the first step, the first evaluation. What is
    still to come is estimated by medians, which a few slow steps or passes do not move. An evaluation that met a busy
    machine says nothing about the next one either: its pass has no backward pass and so takes at most the time of
    a training pass of the same size.
    """
    assert options.max_minutes is not None
    done = len(pace.steps)
    step = statistics.median(pace.steps[done // 2 :])  # the first half warms caches up
    bound = step * evaluations.share
    one_pass = min(pace.one_pass, bound) if pace.one_pass else bound / 3  # backward takes twice the time of forward
    each = step + (one_pass * evaluations.passes / evaluations.every if evaluations.every else 0.0)
    last = one_pass * evaluations.last_passes
    left = 60 * options.max_minutes - pace.elapsed - last
    affordable = done + max(int(left / each), 1)
    steps = max(affordable, options.min_steps or 0)
    if options.steps is not None:
        steps = min(steps, options.steps)
    expected = (pace.elapsed + (steps - done) * each + last) / 60
    least = options.min_steps if options.min_steps is not None else 2 * warmup
    least = least if options.steps is None else min(least, options.steps)
    short = None
    if affordable < least:
        short = (
            f"the budget train.max_minutes={options.max_minutes:g} is enough for {affordable} steps: one takes "
            f"{step:.3g} s here, {pace.elapsed:.0f} s had passed after {done} of them ({pace.first_evaluation:.0f} s "
            f"in the first evaluation), and the last evaluation takes about {math.ceil(last)} s. "
        ) + _consequence(options, steps, expected, least)
    return Budget(
        minutes=options.max_minutes,
        min_steps=options.min_steps,
        affordable=affordable,
        steps=steps,
        step_seconds=step,
        expected_minutes=expected,
        short=short,
    )


def _consequence(options: TrainConfig, steps: int, expected: float, least: int) -> str:
    if options.min_steps is not None:
        return f"The run takes {steps} all the same (train.min_steps), about {expected:.1f} minutes in all"
    return (
        f"That is less than {least}, twice schedule.warmup_steps, so the model learns little: raise train.max_minutes, "
        "set train.min_steps, or wait until the machine is less busy"
    )


def check_same_budget(options: TrainConfig, fixed: dict[str, Any] | None) -> None:
    """Raises ValueError where a run that goes on has another budget than the one that fixed its number of steps."""
    if fixed is None or options.max_minutes is None:
        return
    asked = {"train.max_minutes": options.max_minutes, "train.min_steps": options.min_steps}
    before = {"train.max_minutes": fixed["minutes"], "train.min_steps": fixed["min_steps"]}
    key = next((key for key in asked if asked[key] != before[key]), None)
    if key is None:
        return
    raise ValueError(
        f"{key}={asked[key]}: the steps of this run were fixed at {fixed['steps']} under {key}={before[key]}, and the "
        "schedule with them; set it back, set another run_dir to begin anew, or give the number of steps, for example "
        f"train.max_minutes=null train.steps={2 * fixed['steps']}"
    )
