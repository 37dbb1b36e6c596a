"""Exports of small clinical models with random weights, and the same stays as cohorts and as requests."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from starlette.testclient import TestClient

from attnzoo.clinical.calibration import fit_calibrator
from attnzoo.clinical.calibration_rule import Fit
from attnzoo.clinical.cohort import Cohort
from attnzoo.clinical.evidence import bootstrap_calibrators, judge_maps, measure
from attnzoo.clinical.explain import StayCells
from attnzoo.clinical.grid import Grid
from attnzoo.clinical.outcome import Outcome
from attnzoo.clinical.statistics import Statistics
from attnzoo.clinical.trained import TrainedModel, inputs, save_trained
from attnzoo.clinical.variables import STATICS, VARIABLES
from attnzoo.models import EhrConfig, EhrEncoder
from serve.clinical.loading import load_clinic
from serve.config import ServeConfig
from serve.openai.routes import build_app

NAMES = ("FiO2", "Glucose", "HR", "Lactate", "Temp")
"""Of PhysioNet 2012, in the order of its table."""
WINDOW = 12
MODEL = "tiny"


def icu_cohort(stays: int = 30, hours: int = WINDOW, names: tuple[str, ...] = NAMES) -> Cohort:
    """Plausible values, a third of the cells measured, some twice; the fourth stay has no measurement."""
    random = np.random.default_rng(7)
    counts_NTV = random.poisson(0.4, (stays, hours, len(names))).astype(np.uint8)
    counts_NTV[3] = 0
    ends = np.array([VARIABLES[name].plausible for name in names])
    drawn_NTV = ends[:, 0] + (ends[:, 1] - ends[:, 0]) * random.uniform(0.05, 0.4, counts_NTV.shape)
    values_NTV = np.where(counts_NTV > 0, drawn_NTV.round(3), np.nan).astype(np.float32)
    statics = tuple(STATICS)
    columns = [
        random.integers(20, 90, stays),
        random.integers(0, 2, stays),
        random.integers(150, 190, stays),
        random.integers(50, 110, stays),
        random.integers(1, 5, stays),
    ]
    statics_NS = np.stack(columns, 1).astype(np.float32)
    statics_NS[::5, 2:] = np.nan
    hours_N = np.full(stays, hours)
    hours_N[1] = 5
    values_NTV[1, 5:], counts_NTV[1, 5:] = np.nan, 0
    return Cohort(
        name="set-t",
        grid=Grid(values_NTV, counts_NTV, hours_N, names),
        statics_NS=statics_NS,
        statics=statics,
        stay_ids=tuple(f"stay {i}" for i in range(stays)),
        patient_ids=None,
        labels={"mortality": (np.arange(stays) % 3 == 0).astype(np.float32)},
    )


def small_trained(
    cohort: Cohort, outcome: Outcome | None = None, judged: int = 2, labelled: bool = True, **options: Any
) -> TrainedModel:
    """Random weights, large enough that every measurement matters; calibrated and with evidence where it is yes or
    no. judged: stays on which explanations are; labelled: False for no calibration."""
    outcome = outcome or Outcome(label="mortality")
    statistics = Statistics.fit(cohort, np.arange(10))
    torch.manual_seed(3)
    config = EhrConfig(
        variables=len(cohort.grid.variables),
        statics=len(statistics.static_columns),
        outputs=outcome.outputs,
        hourly=outcome.hourly,
        head="ordinal" if outcome.ordinal else "linear",
        **{"model_dim": 8, "num_heads": 2, "mlp_dim": 16, "chunks": 3, "chunk_hours": 4, **options},
    )
    model = EhrEncoder(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    calibrator, evidence = None, None
    if labelled and not outcome.edges:
        rows = np.arange(10, len(cohort))
        logits = TrainedModel(model, statistics, outcome).logits(cohort, rows)[..., 0]
        drawn = np.random.default_rng(1).logistic(scale=0.5 * logits.std(), size=logits.shape)
        labels = (logits + drawn > np.median(logits)).astype(np.float32)
        calibrator = fit_calibrator(labels.ravel(), logits.ravel())
        fit = Fit(calibrator, bootstrap_calibrators(labels, logits))  # of fewer stays than training would calibrate on
        seen = StayCells(*inputs(statistics, cohort, rows[:judged]))
        maps = judge_maps(model, outcome, seen) if judged > 1 else {}
        evidence = measure(outcome, cohort.label("mortality")[:10], len(rows), fit, maps)
    return TrainedModel(
        model, statistics, outcome, {"format": "physionet2012"}, {"digest": "ab"}, {}, calibrator, evidence
    )


def export(directory: Path, trained: TrainedModel) -> Path:
    """The export in a run directory called `MODEL`."""
    return save_trained(directory / MODEL / "export", trained)


def patient_of(cohort: Cohort, row: int, **fields: Any) -> dict[str, Any]:
    """A stay of the cohort as a patient of a request: a cell that was measured twice has two values."""
    grid, statics = cohort.grid, dict(zip(cohort.statics, cohort.statics_NS[row].tolist(), strict=True))
    measurements = []
    for hour, variable in np.argwhere(grid.counts_NTV[row]).tolist():
        name, count = grid.variables[variable], int(grid.counts_NTV[row, hour, variable])
        value = float(grid.values_NTV[row, hour, variable])
        values = [*[value + 0.5] * (count - 1), value]
        measurements += [
            {"variable": name, "hour": hour + (i + 0.5) / (count + 1), "value": one, "unit": VARIABLES[name].unit}
            for i, one in enumerate(values)
        ]
    words = {name: dict(STATICS[name].categories) for name in ("sex", "icu_type")}
    given = {
        "age_years": statics["age"],
        "sex": words["sex"].get(statics["sex"]),
        "height_cm": statics["height"],
        "weight_kg": statics["weight"],
        "icu_type": words["icu_type"].get(statics["icu_type"]),
    }
    known = {name: None if value != value else value for name, value in given.items()}
    hours = int(grid.hours_N[row])
    return {"id": cohort.stay_ids[row], **known, "cutoff_hour": hours, "measurements": measurements, **fields}


def request_of(cohort: Cohort, rows: list[int], **fields: Any) -> dict[str, Any]:
    """A request for these stays."""
    return {"model": MODEL, "patients": [patient_of(cohort, row) for row in rows], **fields}


@contextmanager
def clinical_client(checkpoint: Path, **settings: Any) -> Iterator[TestClient]:
    """A client of the application without Ray and without a socket."""
    config = ServeConfig(checkpoint=str(checkpoint), **settings)
    with TestClient(build_app(None, config, load_clinic(config)), base_url="http://localhost") as client:
        yield client


def ask(client: TestClient, body: Any, status: int = 200, **options: Any) -> dict[str, Any]:
    """The reply to a prediction, or the error of a refusal with that status."""
    answer = client.post("/v1/predict", json=body, **options)
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json() if status == 200 else answer.json()["error"]
    return found
