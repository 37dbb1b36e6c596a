"""The real clinical and wearable data, which stand beside the project, and small cohorts made up for tests."""

from pathlib import Path

import numpy as np
import pytest

from attnzoo.clinical.cohort import Cohort
from attnzoo.clinical.grid import Grid

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def shared_data(name: str) -> Path:
    """A file or folder of ../shared/data; skips the test where it does not exist."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"the data set {name} is not in {DATA}: it is not part of the project")
    return path


def small_cohort(
    stays: int = 40, hours: int = 6, variables: tuple[str, ...] = ("HR", "Glucose", "pH"), patients: int | None = 23
) -> Cohort:
    """Random measurements, a third of the cells measured; one stay in five died; stays share `patients` patients."""
    rng = np.random.default_rng(5)
    counts_NTV = rng.poisson(0.4, (stays, hours, len(variables))).astype(np.uint8)
    values_NTV = np.where(counts_NTV > 0, rng.gamma(4.0, 20.0, counts_NTV.shape), np.nan).astype(np.float32)
    statics_NS = np.stack([rng.uniform(20, 90, stays), rng.integers(0, 2, stays)], 1).astype(np.float32)
    statics_NS[::7] = np.nan
    return Cohort(
        name="made up",
        grid=Grid(values_NTV, counts_NTV, np.full(stays, hours), variables),
        statics_NS=statics_NS,
        statics=("age", "sex"),
        stay_ids=tuple(f"stay {i}" for i in range(stays)),
        patient_ids=None if patients is None else tuple(f"patient {i % patients}" for i in range(stays)),
        labels={"mortality": (np.arange(stays) % 5 == 0).astype(np.float32)},
    )


def small_wearables(days: int = 24, sensors: tuple[str, ...] = ("bedtime", "sleep_minutes")) -> Cohort:
    """Five people's reports after windows of three days; a bad night makes tired."""
    rng, rows = np.random.default_rng(3), 5 * days
    values_NTV = rng.normal(400, 60, (rows, 3, len(sensors))).astype(np.float32)
    values_NTV[rng.random(values_NTV.shape) < 0.2] = np.nan
    counts_NTV = (~np.isnan(values_NTV)).astype(np.uint8)
    tired_N = (np.nan_to_num(values_NTV[:, -1, -1], nan=400) < 390).astype(np.float32)
    stress_N = (rng.random(rows) < 0.4).astype(np.float32)
    stress_N[::9] = np.nan
    person_N, day_N = np.divmod(np.arange(rows), days)
    return Cohort(
        name="made up",
        grid=Grid(values_NTV, counts_NTV, np.full(rows, 3), sensors, step_hours=24),
        statics_NS=np.zeros((rows, 0), np.float32),
        statics=(),
        stay_ids=tuple(f"p{person} {day}" for person, day in zip(person_N, day_N, strict=True)),
        patient_ids=tuple(f"p{person}" for person in person_N),
        labels={"fatigue": tired_N, "stress": stress_N},
        dates=np.datetime64("2020-01-01") + day_N,
    )
