"""What a record of the metrics tells: of all steps since the one before, not of the last alone."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from train.loop import StepResult, TrainingRun, report


class Bar:
    total: int | None = None

    def set_postfix(self, **values: object) -> None: ...

    def update(self) -> None: ...


def test_seconds_and_throughput_are_means_since_the_last_record() -> None:
    written: list[tuple[int, dict[str, float]]] = []
    metrics = SimpleNamespace(write=lambda kind, step, values: written.append((step, values)))
    config = SimpleNamespace(
        log=SimpleNamespace(every=3, peak_flops=None), optim=SimpleNamespace(lr=1.0), precision="fp32"
    )
    progress = SimpleNamespace(step=0, total_steps=6, skipped=0)
    task = SimpleNamespace(UNIT="stay")
    run: Any = SimpleNamespace(metrics=metrics, config=config, progress=progress, task=task, unrecorded=[])
    run.units_per_step, run.flops_per_step = 12, None
    for seconds in (1.0, 7.0, 1.0, 2.0, 2.0, 2.0):
        progress.step += 1
        step = StepResult(loss=0.5, gradient_norm=1.0, factor=1.0, seconds=seconds, stop=False)
        report(cast(TrainingRun, run), step, Bar())
    told = [(step, values["step_seconds"], values["stays_per_second"]) for step, values in written]
    assert told == [(3, pytest.approx(3.0), pytest.approx(4.0)), (6, pytest.approx(2.0), pytest.approx(6.0))]
