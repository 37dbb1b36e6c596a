"""`train.max_minutes` as a number of steps, by a clock that the test turns: what a run takes, and what it may take."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from train.budget import Budget, Evaluations, MeasuredPace, check_same_budget, plan_steps
from train.config import TrainConfig

WARMUP, MEASURED = 20, 20


@dataclass
class Machine:
    """The demo's run: a step takes 0.7 s, a pass of an evaluation 0.24 s, the last evaluation has 27 passes.

    first_step, first_pass: seconds more in the first of them, as compilation takes. busy: how much slower everything
    is, from one second of the clock to another.
    """

    step: float = 0.7
    one_pass: float = 0.24
    first_step: float = 0.0
    first_pass: float = 0.0
    busy: tuple[float, float, float] = (1.0, 0.0, 0.0)
    evaluations: Evaluations = field(
        default_factory=lambda: Evaluations(every=50, passes=8, last_passes=27, share=2.0)  # two passes of 8 a step
    )
    clock: float = 0.0

    def take(self, seconds: float) -> float:
        factor, begin, end = self.busy
        seconds *= factor if begin <= self.clock < end else 1.0
        self.clock += seconds
        return seconds

    def evaluate(self, passes: int) -> list[float]:
        return [self.take(self.one_pass) for _ in range(passes)]

    def run(self, **options: Any) -> tuple[Budget, float]:
        """(what was planned after 20 steps, the minutes that such a run takes on this machine)."""
        self.clock += self.first_pass
        passes = self.evaluate(self.evaluations.passes) if self.evaluations.every else []
        first = self.clock
        steps = [self.take(self.step) + (self.first_step if i == 0 else 0.0) for i in range(MEASURED)]
        self.clock += self.first_step
        one_pass = sorted(passes)[len(passes) // 2] if passes else 0.0
        pace = MeasuredPace(steps=steps, one_pass=one_pass, first_evaluation=first, elapsed=self.clock)
        found = plan_steps(TrainConfig(**options), WARMUP, pace, self.evaluations)
        for step in range(MEASURED + 1, found.steps + 1):
            self.take(self.step)
            if self.evaluations.every and step % self.evaluations.every == 0 and step != found.steps:
                self.evaluate(self.evaluations.passes)
        self.evaluate(self.evaluations.last_passes)
        return found, self.clock / 60


STEADY = {
    "steady": Machine(),
    "compilation in the first step": Machine(first_step=80.0),
    "compilation in the first pass": Machine(first_pass=60.0),
    "no evaluation on the way": Machine(evaluations=Evaluations(every=None, passes=8, last_passes=27, share=2.0)),
    "busy throughout": Machine(busy=(3.0, 0.0, 1e9)),
}


@pytest.mark.parametrize("name", STEADY)
def test_the_budget_is_used_up_and_kept(name: str) -> None:
    """A machine that is steady after the first 20 steps, whatever came before, takes the minutes it was given."""
    found, minutes = STEADY[name].run(max_minutes=4.0)
    assert found.short is None
    assert found.steps == found.affordable > 60
    assert 3.6 < minutes < 4.05
    assert found.expected_minutes == pytest.approx(minutes, abs=0.3)


def test_a_slow_first_evaluation_is_counted_once() -> None:
    """It took 115 s of 4 minutes; the rest is for training, and the next evaluations are as fast as steps allow."""
    found, minutes = Machine(busy=(60.0, 0.0, 110.0)).run(max_minutes=4.0)
    assert found.steps > 80
    assert found.short is None
    assert 3 < minutes < 4


@pytest.mark.parametrize(("least", "steps"), [(None, 21), (100, 100)])
def test_a_budget_that_is_nearly_gone_is_said(least: int | None, steps: int) -> None:
    found, minutes = Machine(first_step=230.0).run(max_minutes=4.0, min_steps=least)
    assert (found.affordable, found.steps) == (21, steps)
    assert found.short is not None
    for words in ("train.max_minutes=4 is enough for 21 steps", "one takes 0.7 s", "2 s in the first evaluation"):
        assert words in found.short
    if least is None:
        assert "less than 40, twice schedule.warmup_steps, so the model learns little: raise" in found.short
    else:
        assert f"takes 100 all the same (train.min_steps), about {found.expected_minutes:.1f} minutes" in found.short
        assert found.expected_minutes == pytest.approx(minutes, abs=0.3)


def test_a_busy_machine_takes_the_least_steps_and_says_how_long() -> None:
    found, minutes = Machine(busy=(5.0, 0.0, 1e9)).run(max_minutes=4.0, min_steps=90)
    assert found.affordable < 90 == found.steps
    assert found.short is not None
    assert found.expected_minutes == pytest.approx(minutes, rel=0.05)
    assert minutes > 4


def test_train_steps_is_an_upper_bound() -> None:
    for options in ({}, {"min_steps": 50}):
        found, _ = Machine().run(max_minutes=4.0, steps=30, **options)
        assert (found.steps, found.short) == (30, None)
    found, _ = Machine(first_step=500.0).run(max_minutes=4.0, steps=30, min_steps=50)
    assert found.steps == 30
    assert found.short is not None


def test_a_run_keeps_the_budget_that_it_began_with() -> None:
    fixed = Machine().run(max_minutes=4.0)[0].to_dict()
    for minutes in (None, 4.0):
        check_same_budget(TrainConfig(max_minutes=minutes), fixed)
    check_same_budget(TrainConfig(max_minutes=8.0), None)
    for key, options in (("max_minutes=8.0", {"max_minutes": 8.0}), ("min_steps=500", {"min_steps": 500})):
        with pytest.raises(ValueError, match=rf"^train.{key}: the steps of this run were fixed at \d+ under .* set "):
            check_same_budget(TrainConfig(**{"max_minutes": 4.0, **options}), fixed)  # type: ignore[arg-type]
