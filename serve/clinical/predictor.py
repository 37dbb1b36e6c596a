"""A clinical model that is served: from the cohort of a request to logits, probabilities and their intervals.

Patients of one request are computed together. Everything here runs in a thread beside the event loop, and stops between
two calls of the model once the request's deadline has passed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnzoo.checkpoint import model_files
from attnzoo.clinical.evidence import ATTENTION, GRADIENTS
from attnzoo.clinical.explain import StayCells
from attnzoo.clinical.formats.fhir import TABLES
from attnzoo.clinical.statistics import Statistics
from attnzoo.clinical.trained import STATISTICS, TrainedModel, inputs, load_trained
from attnzoo.clinical.variables import PMDATA, STATICS, VARIABLES
from attnzoo.report import counted
from serve.clinical.intake import Intake, Needs
from serve.workplace import Deadline

LEVEL = 0.95
"""Of the intervals."""
BATCH = 256
"""Patients that the model is given at a time."""
OUTCOMES = {"mortality": "death in hospital", "los": "remaining length of stay"}
"""Labels in words."""
NOT_KNOWN = "it was exported before calibration was drawn again; export it again by the training command"

NOT_CALIBRATED = "this model is not calibrated, and has no interval"


def needs_of(statistics: Statistics, statics: tuple[str, ...], max_patients: int, path: Path) -> Needs:
    """What a model with these statistics is asked by. Raises ValueError for what /v1/predict cannot ask for."""
    if set(statistics.variables) <= set(PMDATA):
        raise ValueError(f"{path}: the steps of this model are days; /v1/predict takes models of hourly grids")
    unknown = [one for one in statistics.variables if one not in VARIABLES]
    unknown += [one for one in statics if one not in STATICS]
    if unknown:
        raise ValueError(
            f"{path}: {unknown[0]!r} has no row in attnzoo/clinical/variables.py, so that its unit is not known"
        )
    table = {name: VARIABLES[name] for name in statistics.variables}
    return Needs(table=table, statics=statics, window=statistics.hours, max_patients=max_patients)


def interval_words(what: str, draws: int, stays: int) -> str:
    """What low and high mean. what: was fitted again to so many bootstrap samples of so many stays."""
    return (
        f"{LEVEL:.0%} interval of the calibrated probability: {what}, fitted again to {draws} bootstrap samples of the "
        f"{stays:,} stays on which the model is calibrated. It tells how well the calibration is known, not how models "
        "of other training runs would differ."
    )


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """name: of the model in the API. digests: sha256 of its files, of all of them and of the weights."""

    name: str
    trained: TrainedModel
    needs: Needs
    version: str
    weights_digest: str

    @classmethod
    def load(cls, directory: Path, name: str, max_patients: int) -> "Predictor":
        """The model of an export. Raises ValueError as `load_trained`, and for one whose variables /v1/predict cannot
        ask for."""
        path = model_files.find(directory)
        trained = load_trained(path)
        needs = needs_of(trained.statistics, trained.statistics.static_names, max_patients, path)
        version, weights = model_files.digests(path, STATISTICS)
        return cls(name=name, trained=trained, needs=needs, version=version, weights_digest=weights)

    @cached_property
    def names(self) -> str | None:
        """The table of names that FHIR is read by; None where no table has all variables of the model."""
        fits = (name for name, table in TABLES.items() if set(self.needs.table) <= set(table))
        own = str(self.trained.data.get("format"))
        found = list(fits)
        return own if own in found else next(iter(found), None)

    @property
    def explains(self) -> tuple[str, ...]:
        """Values of `explain` beside "none"."""
        return ("gradients",) if self.trained.model.config.hourly else ("gradients", "attention")

    @property
    def outcome_words(self) -> str:
        """What is predicted, in words."""
        label = self.trained.outcome.label
        return OUTCOMES.get(label, label)

    @torch.no_grad()
    def logits(self, intake: Intake, deadline: Deadline) -> np.ndarray:
        """[N, outputs] at the cut-off of each patient."""
        parts = []
        for start in range(0, len(intake.cohort), BATCH):
            deadline.check()
            rows = np.arange(start, min(start + BATCH, len(intake.cohort)))
            logits = self.trained.logits(intake.cohort, rows)
            if self.trained.outcome.hourly:
                logits = logits[np.arange(len(rows)), intake.cohort.grid.hours_N[rows] - 1]
            parts.append(logits)
        return finite(np.concatenate(parts))

    def hours(self, intake: Intake) -> "HourByHour":
        """The same after each hour."""
        return HourByHour(self, intake)

    def told(self, logits_NO: np.ndarray) -> list[dict[str, Any]]:
        """Of each row what a reply says: probability with interval, or buckets."""
        found = self.trained.probabilities(logits_NO)
        edges = self.trained.outcome.edges
        if edges:
            starts, ends = (0.0, *edges), (*edges, None)
            return [
                {
                    **dict.fromkeys(("probability", "low", "high")),
                    "buckets": [
                        {"from": start, "to": end, "probability": float(p)}
                        for start, end, p in zip(starts, ends, row, strict=True)
                    ],
                }
                for row in found
            ]
        evidence = self.trained.evidence
        drawn = None if evidence is None else evidence.interval(logits_NO[:, 0], LEVEL)
        return [
            {
                "probability": float(p),
                # The bounds are of other calibrators than the number: they are widened where they miss it.
                "low": None if drawn is None else min(float(drawn[0][row]), float(p)),
                "high": None if drawn is None else max(float(drawn[1][row]), float(p)),
                "buckets": None,
            }
            for row, p in enumerate(found)
        ]

    def interval(self) -> tuple[dict[str, Any] | None, str | None]:
        """(what low and high mean, None), or (None, why there are none)."""
        evidence = self.trained.evidence
        if self.trained.outcome.edges:
            return None, "the outcome has buckets, and no interval is defined for their probabilities"
        if evidence is not None and evidence.uncalibrated is not None:
            return None, f"{NOT_CALIBRATED}: {evidence.uncalibrated}"
        if self.trained.calibrator is None or evidence is None or not evidence.calibrators:
            return None, f"this model has no interval: {NOT_KNOWN}"
        words = interval_words("temperature and intercept", len(evidence.calibrators), evidence.calibration_stays)
        return {"level": LEVEL, "method": "calibration bootstrap", "words": words}, None

    def base_rate(self) -> dict[str, Any] | None:
        """How frequent the outcome is in the training stays; None where it is not known or has buckets."""
        evidence = self.trained.evidence
        if evidence is None or self.trained.outcome.edges:
            return None
        what = "the hours of the" if self.trained.outcome.hourly else "the"
        words = f"{evidence.shares[0]:.1%} of {what} {counted(evidence.stays, 'training stay')}"
        return {"probability": evidence.shares[0], "stays": evidence.stays, "words": words}

    def stay(self, intake: Intake, row: int) -> StayCells:
        """The cells of one patient, without padding."""
        cells, statics, hours = inputs(self.trained.statistics, intake.cohort, np.array([row]))
        return StayCells(cells[:, : int(hours[0])], statics, hours)

    def map_name(self, explain: str) -> str:
        """The name of the map that a value of `explain` asks for."""
        return {"gradients": GRADIENTS, "attention": ATTENTION}[explain]


class HourByHour:
    """Logits after each hour, computed one hour at a time: the state of the model is extended by the hour."""

    def __init__(self, predictor: Predictor, intake: Intake) -> None:
        self._model = predictor.trained.model
        self._cells: Tensor
        rows = np.arange(len(intake.cohort))
        self._cells, statics, self._hours_N = inputs(predictor.trained.statistics, intake.cohort, rows)
        self._state = self._model.init_state(statics)
        self.number = int(self._hours_N.max())
        """Hours of the longest stay."""
        self._next = 0

    @torch.no_grad()
    def next(self) -> np.ndarray:
        """[N, outputs] after one hour more; rows of stays that have ended hold 0."""
        cells_N1VC = self._cells[:, self._next : self._next + 1]
        real_N = (self._hours_N > self._next).long()
        logits_N1O, self._state = self._model.extend(cells_N1VC, self._state, real_N)
        self._next += 1
        return finite(logits_N1O[:, 0].numpy())

    def all(self, deadline: Deadline) -> Iterator[np.ndarray]:
        """The rest of the hours."""
        while self._next < self.number:
            deadline.check()
            yield self.next()


def finite(logits: np.ndarray) -> np.ndarray:
    """The same. Raises FloatingPointError for logits that are none."""
    if not np.isfinite(logits).all():
        raise FloatingPointError("the model's logits are not finite")
    return logits
