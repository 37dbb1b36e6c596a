"""Schedules by numbers."""

import pytest

from train.config import ScheduleConfig
from train.schedule import rate


def rates(total: int, **options: object) -> list[float]:
    schedule = ScheduleConfig(**options)  # type: ignore[arg-type]
    return [rate(schedule, step, total) for step in range(total)]


def test_cosine() -> None:
    found = rates(9, kind="cosine", warmup_steps=5, final_fraction=0.2)
    # 0.2 + 0.8 * (1 + cos(pi * k / 4)) / 2 for k = 1..4
    expected = [0.2, 0.4, 0.6, 0.8, 1.0, 0.8828427, 0.6, 0.3171573, 0.2]
    assert found == pytest.approx(expected, abs=1e-6)


def test_wsd() -> None:
    found = rates(10, kind="wsd", warmup_steps=2, decay_fraction=0.4, final_fraction=0.0)
    assert found == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])


def test_wsd_stops_at_the_final_fraction() -> None:
    found = rates(10, kind="wsd", warmup_steps=0, decay_fraction=0.2, final_fraction=0.5)
    assert found == pytest.approx([1] * 8 + [0.75, 0.5])


def test_constant() -> None:
    assert rates(5, kind="constant", warmup_steps=2) == [0.5, 1, 1, 1, 1]


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("total", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("warmup", [0, 1, 3, 20])
def test_rates_are_factors_and_fall_after_the_warmup(kind: str, total: int, warmup: int) -> None:
    found = rates(total, kind=kind, warmup_steps=warmup, final_fraction=0.1)
    assert all(0 < value <= 1 for value in found)
    after = found[max(min(warmup, total) - 1, 0) :]
    assert after == sorted(after, reverse=True)


def test_the_warmup_does_not_depend_on_the_length() -> None:
    schedule = ScheduleConfig(kind="wsd", warmup_steps=20)
    assert [rate(schedule, s, 10**9) for s in range(20)] == [rate(schedule, s, 100) for s in range(20)]
