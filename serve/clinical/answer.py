"""Writes the reply to a prediction: its head, each patient, and each hour."""

import hashlib
import time
import uuid
from typing import Any, Protocol

import numpy as np

from attnzoo.clinical.content import data_digest
from attnzoo.clinical.grid import Grid
from attnzoo.clinical.statistics import coverage
from attnzoo.clinical.units import spellings
from attnzoo.clinical.variables import Table, Variable
from serve.clinical.explanations import explained
from serve.clinical.intake import FIELDS, Intake
from serve.clinical.predictor import HourByHour, Predictor
from serve.workplace import Deadline

NOTICE = "For research only: this is no medical device, and nothing here may decide about a patient."
EARLY = (
    "The model has learned from whole stays of up to {} hours: whether its probabilities hold after fewer hours was "
    "not checked."
)
NOTHING = {"probability": None, "low": None, "high": None, "buckets": None}
OK, NOT_ENOUGH = "ok", "not_enough_data"


class Served(Protocol):
    """A clinical model that is served: what the head of its replies tells of it."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def weights_digest(self) -> str: ...

    @property
    def trained(self) -> Any: ...

    def interval(self) -> tuple[dict[str, Any] | None, str | None]:
        """(what low and high mean, None), or (None, why there are none)."""


def head_of(served: Served, trained_on: str | None, training_stays: int | None, **others: Any) -> dict[str, Any]:
    """What is the same for all patients of a reply, of any model. others: what is told of this kind of model alone."""
    interval, reason = served.interval()
    return {
        "id": f"predict-{uuid.uuid4().hex}",
        "object": "prediction.list",
        "created": int(time.time()),
        "model": {
            "id": served.name,
            "version": served.version,
            "weights_digest": served.weights_digest,
            "data_digest": data_digest(served.trained.split),
            "trained_on": trained_on,
            "training_stays": training_stays,
        },
        "research_use_only": NOTICE,
        "interval": interval,
        "interval_reason": reason,
        **others,
    }


def head(predictor: Predictor) -> dict[str, Any]:
    """What is the same for all patients of a reply."""
    trained = predictor.trained
    return head_of(
        predictor,
        trained.statistics.cohort,
        trained.statistics.rows,
        outcome=outcome_of(predictor),
        early_hours=None if trained.outcome.hourly else EARLY.format(predictor.needs.window),
        base_rate=predictor.base_rate(),
        variables=[variable_of(variable) for variable in predictor.needs.table.values()],
    )


def outcome_of(predictor: Predictor) -> dict[str, Any]:
    """What is predicted."""
    outcome = predictor.trained.outcome
    return {
        "label": outcome.label,
        "words": predictor.outcome_words,
        "kind": "buckets" if outcome.edges else "yes_no",
        "window_hours": predictor.needs.window,
        "each_hour": outcome.hourly,
        "edges": list(outcome.edges),
    }


def card(predictor: Predictor, created: int) -> dict[str, Any]:
    """The model in the list of models."""
    return {
        "id": predictor.name,
        "object": "model",
        "created": created,
        "owned_by": "attnzoo",
        "kind": "clinical",
        "version": predictor.version,
        "research_use_only": NOTICE,
        "outcome": outcome_of(predictor),
        "base_rate": predictor.base_rate(),
        "least_coverage": predictor.trained.statistics.least_coverage,
        "window_hours": predictor.needs.window,
        "max_patients": predictor.needs.max_patients,
        "explains": ["none", *predictor.explains],
        "statics": [FIELDS[name] for name in predictor.needs.statics],
        "reads": ["measurements"],
        "variables": variables_with_units(predictor.needs.table),
    }


def variables_with_units(table: Table) -> list[dict[str, Any]]:
    """The variables that a model takes, with the spellings of units that are known."""
    return [{**variable_of(variable), "units": spellings(variable)} for variable in table.values()]


def variable_of(variable: Variable) -> dict[str, Any]:
    """A variable, in whose unit all values of a reply are."""
    return {
        "name": variable.name,
        "meaning": variable.meaning,
        "unit": variable.unit,
        "plausible": list(variable.plausible),
    }


class Coverage:
    """The guard: the share of measured cells of each patient until each hour, against that of training stays."""

    def __init__(self, least: float, grid: Grid) -> None:
        self.least = least
        self.share_N = coverage(grid)
        measured_NT = np.cumsum(np.count_nonzero(grid.counts_NTV, axis=2), axis=1)
        self.share_NT = measured_NT / (len(grid.variables) * np.arange(1, grid.hours + 1))

    def told(self, row: int) -> dict[str, float]:
        """The part `coverage` of a patient."""
        return {"measured": float(self.share_N[row]), "least": self.least}

    def reasons(self, share: float) -> list[str]:
        """Why there is no number; empty where there is enough data."""
        if share > 0 and share >= self.least:
            return []
        if share == 0:
            return ["no value of the model's variables is known"]
        return [f"{share:.2%} of the cells are measured; 99 % of the training stays had {self.least:.2%} or more"]


def guard_of(predictor: Predictor, intake: Intake) -> Coverage:
    """The guard of the patients of a request."""
    return Coverage(predictor.trained.statistics.least_coverage, intake.cohort.grid)


def hour_of(guard: Coverage, row: int, hour: int, told: dict[str, Any]) -> dict[str, Any]:
    """An entry of `by_hour`: after `hour` hours, from 1."""
    share = float(guard.share_NT[row, hour - 1])
    reasons = guard.reasons(share)
    numbers = NOTHING if reasons else told
    return {"hour": hour, "status": NOT_ENOUGH if reasons else OK, "coverage": share, **numbers}


def by_hour(predictor: Predictor, intake: Intake, deadline: Deadline) -> list[list[dict[str, Any]]]:
    """For each patient the risk after each hour of the stay."""
    guard, course = guard_of(predictor, intake), HourByHour(predictor, intake)
    found: list[list[dict[str, Any]]] = [[] for _ in intake.patients]
    for hour, logits_NO in enumerate(course.all(deadline), 1):
        for row, told in enumerate(predictor.told(logits_NO)):
            if hour <= intake.patients[row].hours:
                found[row].append(hour_of(guard, row, hour, told))
    return found


def patients_of(
    predictor: Predictor, intake: Intake, explain: str, hours: list[list[dict[str, Any]]] | None, deadline: Deadline
) -> list[dict[str, Any]]:
    """The patients of a reply. hours: `by_hour` where it is asked for."""
    guard = guard_of(predictor, intake)
    logits_NO = predictor.logits(intake, deadline)
    found = []
    for row, (patient, told) in enumerate(zip(intake.patients, predictor.told(logits_NO), strict=True)):
        share = float(guard.share_N[row])
        reasons = guard.reasons(share)
        explanations, reason = [], None
        if explain != "none" and not reasons:
            try:
                explanations.append(explained(predictor, intake, row, explain, logits_NO[row], deadline))
            except ValueError as error:
                reason = str(error)
        found.append(
            {
                "id": patient.id,
                "status": NOT_ENOUGH if reasons else OK,
                "reasons": reasons,
                "coverage": guard.told(row),
                "cutoff_hour": patient.hours,
                "cutoff_time": None if patient.cutoff is None else patient.cutoff.isoformat(),
                "input_digest": _digest(intake, row),
                **(NOTHING if reasons else told),
                "by_hour": [] if hours is None else hours[row],
                "measurements": patient.account.to_dict(),
                "cells": intake.cells[row] if explain != "none" else [],
                "explanations": explanations,
                "explanation_reason": reason,
            }
        )
    return found


def _digest(intake: Intake, row: int) -> str:
    """Of what the model was given of a patient, without padding."""
    grid, hours = intake.cohort.grid, intake.patients[row].hours
    whole = hashlib.sha256("\0".join((*grid.variables, *intake.cohort.statics)).encode())
    for part in (grid.values_NTV[row, :hours], grid.counts_NTV[row, :hours], intake.cohort.statics_NS[row]):
        whole.update(np.ascontiguousarray(part).tobytes())
    return whole.hexdigest()


def reply(predictor: Predictor, intake: Intake, explain: str, hourly: bool, deadline: Deadline) -> dict[str, Any]:
    """The whole reply."""
    hours = by_hour(predictor, intake, deadline) if hourly else None
    patients = patients_of(predictor, intake, explain, hours, deadline)
    found = {**head(predictor), "patients": patients}
    return found if intake.bundle is None else {**found, "bundle": intake.bundle}
