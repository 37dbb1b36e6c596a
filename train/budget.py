"""Turns train.max_minutes into a number of steps, from the times of the first steps and the first evaluation."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class MeasuredPace:
    """Measured times in seconds.

    steps: of each step. one_pass: median pass of the first evaluation; 0 if there was none. first_evaluation: all its
    passes. elapsed: since the run began, including the steps and the first evaluation.
    """

    steps: Sequence[float]
    one_pass: float
    first_evaluation: float
    elapsed: float


@dataclass(frozen=True, kw_only=True)
class Evaluations:
    """Evaluations of a run. every: steps between them (None: only the last). passes, last_passes: passes of a rank in
    each, and in the last. share: size of an evaluation pass relative to a step, at least that of a training pass.
    """

    every: int | None
    passes: int
    last_passes: int
    share: float


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The result of `plan_steps`. affordable: steps that fit into the budget; steps: steps that the run will take.

    short: a warning if the budget is too small for the model to learn much; else None.
    """

    minutes: float
    min_steps: int | None
    affordable: int
    steps: int
    step_seconds: float
    expected_minutes: float
    short: str | None

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dictionary, for checkpoints and reports."""
        return asdict(self)


def plan_steps(options: TrainConfig, warmup: int, pace: MeasuredPace, evaluations: Evaluations) -> Budget:
    """The number of steps for `options.max_minutes`, after the steps in `pace.steps`.

    Elapsed time counts fully, with compilation and the first evaluation. The remaining time is estimated with medians,
    which a few slow steps or passes do not change. An evaluation pass is assumed to take at most the time of a training
    pass of the same size, because it has no backward pass; so one evaluation on a busy machine does not distort it.
    """
    assert options.max_minutes is not None
    done = len(pace.steps)
    step = statistics.median(pace.steps[done // 2 :])  # the first half is warm-up
    bound = step * evaluations.share
    one_pass = min(pace.one_pass, bound) if pace.one_pass else bound / 3  # backward takes twice as long as forward
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
    """Raises ValueError if a resumed run has another budget than the one that determined its number of steps."""
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
