"""A model of texts that is served: from the texts of a request to logits, probabilities and their intervals."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnzoo.checkpoint import model_files
from attnzoo.clinical.text_evidence import WordCount
from attnzoo.clinical.trained_ldam import STATISTICS, VOCABULARY, TrainedLdam, inputs_of, load_ldam
from serve.clinical.intake import Admitted, Intake, Needs, check_ids, check_number, take_in
from serve.clinical.notes.protocol import OF_SERIES, NotesRequest
from serve.clinical.predictor import LEVEL, NOT_CALIBRATED, NOT_KNOWN, finite, interval_words, needs_of
from serve.clinical.protocol import PatientEntry, PredictRequest
from serve.openai.errors import ApiError
from serve.workplace import Deadline

PAIRS = 1 << 22
"""Pairs of tokens that the model compares at a time, over all texts that it is given."""


@dataclass(frozen=True, kw_only=True)
class Notes:
    """The patients of a request. tensors: what `inputs_of` takes of them. counts: the words of each text. series: what
    became of their measurements; None where the model reads none."""

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    counts: tuple[WordCount, ...]
    series: Intake | None

    def patient(self, row: int) -> Admitted | None:
        """The patient of the series; None where there are none."""
        return None if self.series is None else self.series.patients[row]

    def digest(self, row: int) -> str:
        """Of what the model is given of a patient, without padding."""
        words_NL, lengths_N, *series = self.tensors
        whole = hashlib.sha256(words_NL[row, : int(lengths_N[row])].numpy().tobytes())
        if series:
            cells_NTVC, hours_N = series
            whole.update(b"series" + cells_NTVC[row, : int(hours_N[row])].numpy().tobytes())
        return whole.hexdigest()


@dataclass(frozen=True, kw_only=True)
class NoteReader:
    """name: of the model in the API. needs: what is asked of its series; None where it reads none. version,
    weights_digest: as of `serve.clinical.predictor.Predictor`."""

    name: str
    trained: TrainedLdam
    needs: Needs | None
    max_patients: int
    version: str
    weights_digest: str

    explains = ("gradients", "attention")
    """Values of `explain` beside "none"."""

    @classmethod
    def load(cls, directory: Path, name: str, max_patients: int) -> "NoteReader":
        """The model of an export. Raises ValueError as `load_ldam`, and for one whose variables /v1/predict cannot ask
        for."""
        path = model_files.find(directory)
        trained = load_ldam(path)
        statistics, needs = trained.statistics, None
        if statistics is not None:
            needs = needs_of(statistics, (), max_patients, path)
        version, weights = model_files.digests(path, VOCABULARY, *([] if needs is None else [STATISTICS]))
        return cls(
            name=name, trained=trained, needs=needs, max_patients=max_patients, version=version, weights_digest=weights
        )

    def take_in(self, request: NotesRequest) -> Notes:
        """The patients of a request. Raises ApiError 400 that names the field."""
        check_number(len(request.patients), self.max_patients, "patients")
        ids = check_ids([entry.id for entry in request.patients])
        series = self._series(request)
        texts = tuple(entry.text for entry in request.patients)
        tensors: tuple[Tensor, ...] = self.trained.vocabulary.inputs(texts, self.trained.longest)
        if self.trained.statistics is not None and series is not None:
            hours_N = torch.from_numpy(np.asarray(series.cohort.grid.hours_N, np.int64))
            rows = np.arange(len(ids))
            tensors = (*tensors, torch.from_numpy(self.trained.statistics.cells(series.cohort.grid, rows)), hours_N)
        count = self.trained.vocabulary, self.trained.longest
        counts = tuple(WordCount.of(text, *count) for text in texts)
        return Notes(ids=ids, texts=texts, tensors=tensors, counts=counts, series=series)

    def _series(self, request: NotesRequest) -> Intake | None:
        if self.needs is None:
            given = [("cutoff_hour", request.cutoff_hour)]
            for row, entry in enumerate(request.patients):
                given += [(f"patients[{row}].{name}", getattr(entry, name)) for name in OF_SERIES]
            for where, value in given:
                if value is not None:
                    text = f"{where} is given, and {self.name!r} reads texts alone; leave it out"
                    raise ApiError(400, text, param=where, code="unsupported")
            return None
        patients = [
            PatientEntry(
                id=entry.id,
                admitted=entry.admitted,
                cutoff_hour=entry.cutoff_hour,
                measurements=entry.measurements or [],
            )
            for entry in request.patients
        ]
        whole = PredictRequest(model=request.model, cutoff_hour=request.cutoff_hour, patients=patients)
        return take_in(whole, self.needs)

    @torch.no_grad()
    def logits(self, notes: Notes, deadline: Deadline) -> np.ndarray:
        """[N, labels]."""
        parts = []
        for rows in self.blocks(len(notes.ids), notes.tensors[0].shape[1]):
            deadline.check()
            parts.append(self.trained.model(inputs_of([tensor[rows] for tensor in notes.tensors])).float().numpy())
        return finite(np.concatenate(parts))

    @staticmethod
    def blocks(texts: int, tokens: int) -> Iterator[slice]:
        """Slices of texts that the model is given at a time, so that long ones take no more memory than short ones."""
        size = max(1, PAIRS // max(tokens, 1) ** 2)
        for start in range(0, texts, size):
            yield slice(start, start + size)

    def told(self, logits_NK: np.ndarray) -> list[list[dict[str, Any]]]:
        """Of each row, by label: the probability with its interval, null where nobody knows one."""
        found_NK, calibration = self.trained.probabilities(logits_NK), self.trained.calibration
        low_NK = high_NK = np.full(found_NK.shape, np.nan)
        if calibration is not None:
            low_NK, high_NK = calibration.interval(logits_NK, LEVEL)
        # The bounds are of other calibrators than the number: they are widened where they miss it.
        low_NK, high_NK = np.minimum(low_NK, found_NK), np.maximum(high_NK, found_NK)
        return [
            [
                {"label": label, "probability": float(p), "low": _known(low), "high": _known(high)}
                for label, p, low, high in zip(self.trained.labels, *row, strict=True)
            ]
            for row in zip(found_NK, low_NK, high_NK, strict=True)
        ]

    def interval(self) -> tuple[dict[str, Any] | None, str | None]:
        """(what low and high mean, None), or (None, why there are none)."""
        calibration = self.trained.calibration
        if calibration is None:
            return None, f"this model has no interval: {NOT_KNOWN}"
        number = max(map(len, calibration.drawn))
        refused = [one for one in calibration.refused if one is not None]
        if not number:
            why = refused[0] if refused else "the texts that calibrate it have no label of both kinds"
            return None, f"{NOT_CALIBRATED}: {why}"
        what = "one temperature for all labels" if calibration.exclusive else "temperature and intercept of each label"
        words = interval_words(what, number, calibration.rows)
        if refused:
            bare = zip(self.trained.labels, calibration.refused, strict=True)
            told = "; ".join(f"{label}: {why}" for label, why in bare if why is not None)
            words = f"{words} Labels that are not calibrated have none: {told}."
        return {"level": LEVEL, "method": "calibration bootstrap", "words": words}, None

    def reasons(self, found: WordCount) -> list[str]:
        """Why a text is not enough for a number; empty where it is. A model that has learned from stays without texts
        beside their series takes such."""
        evidence = self.trained.evidence
        learned_without = self.needs is not None and (evidence is None or evidence.least_known == 0)
        if not found.known and not learned_without:
            return ["no word of the text is known to the model" if found.words else "the text has no word"]
        return [] if evidence is None else evidence.reasons(found)


def _known(bound: float) -> float | None:
    return None if np.isnan(bound) else float(bound)
