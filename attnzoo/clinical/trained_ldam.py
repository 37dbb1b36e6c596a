"""A trained LDAM on disk: config.json, model.safetensors, vocabulary.json, and statistics.json where it reads series.

What its predictions depend on travels with the weights: the words of training rows, the labels with their definitions,
the statistics, the calibration, and which rows it learned from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnzoo.checkpoint import model_files
from attnzoo.clinical import checks
from attnzoo.clinical.cohort import Cohort, chosen_rows
from attnzoo.clinical.label_calibration import LabelCalibration
from attnzoo.clinical.statistics import Statistics
from attnzoo.clinical.text_evidence import TextEvidence
from attnzoo.clinical.words import Vocabulary
from attnzoo.files import read_object
from attnzoo.models import Ldam, LdamConfig, LdamInputs

FORMAT = "attnzoo-ldam-1"
VOCABULARY, STATISTICS = "vocabulary.json", "statistics.json"
KEYS = ("format", "model", "labels", "definitions", "longest", "data", "split", "metadata", "calibration", "evidence")
"""Keys of config.json."""


def inputs_of(tensors: Sequence[Tensor]) -> LdamInputs:
    """(words_NL, lengths_N), or these and (cells_NTVC, hours_N), as `inputs` gives them."""
    cells_NTVC, hours_N = (*tensors[2:4], None, None)[:2]
    return LdamInputs(words_NL=tensors[0], lengths_N=tensors[1], cells_NTVC=cells_NTVC, hours_N=hours_N)


@dataclass(frozen=True)
class TrainedLdam:
    """A model in evaluation mode with what its predictions depend on.

    labels: by output; definitions: in words, of each. longest: tokens of a text that are read. statistics: None where
    the model reads no series. data, split, metadata: as of `attnzoo.clinical.trained.TrainedModel`. calibration: fitted
    on the inner validation rows. evidence: what is known about the predictions. Both are None in exports of before
    they were measured.
    """

    model: Ldam
    vocabulary: Vocabulary
    labels: tuple[str, ...]
    definitions: tuple[str, ...]
    longest: int
    statistics: Statistics | None = None
    data: dict[str, Any] = field(default_factory=dict)
    split: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    calibration: LabelCalibration | None = None
    evidence: TextEvidence | None = None

    def __post_init__(self) -> None:
        outputs, words = len(self.model.config.definitions), self.model.config.vocab_size
        for name, given, wanted in (
            ("labels", len(self.labels), outputs),
            ("definitions", len(self.definitions), outputs),
            ("vocabulary", len(self.vocabulary), words),
        ):
            if given != wanted:
                raise ValueError(f"{name} has {given} entries; the model has {wanted}")
        if (self.statistics is not None) != bool(self.model.config.variables):
            raise ValueError("statistics belong to a model of series, and to no other")
        if self.calibration is not None:
            wanted = 1 if self.model.config.exclusive else outputs
            if (self.calibration.exclusive, len(self.calibration.calibrators)) != (self.model.config.exclusive, wanted):
                raise ValueError("calibration is that of other labels than the model's")
        if self.evidence is not None and len(self.evidence.shares) != outputs:
            raise ValueError(f"evidence.shares has {len(self.evidence.shares)} entries; the model has {outputs}")

    def inputs(self, cohort: Cohort, rows: np.ndarray | None = None) -> tuple[Tensor, ...]:
        """What `inputs_of` takes, of rows of a cohort. Raises ValueError for a cohort without texts, and for other
        variables than those of training."""
        rows = chosen_rows(cohort, rows)
        if cohort.texts is None:
            raise ValueError(f"cohort {cohort.name!r} has no texts; load it with them (eicu: texts=True)")
        words = self.vocabulary.inputs([cohort.texts[row] for row in rows], self.longest)
        if self.statistics is None:
            return words
        hours_N = torch.from_numpy(np.asarray(cohort.grid.hours_N[rows], np.int64))
        return (*words, torch.from_numpy(self.statistics.cells(cohort.grid, rows)), hours_N)

    @torch.no_grad()
    def logits(self, cohort: Cohort, rows: np.ndarray | None = None, batch_size: int = 64) -> np.ndarray:
        """[N, labels], float32."""
        rows = chosen_rows(cohort, rows)
        checks.count(batch_size, "batch_size", 1)
        found = [np.zeros((0, len(self.labels)), np.float32)]
        for start in range(0, len(rows), batch_size):
            given = self.inputs(cohort, rows[start : start + batch_size])
            found.append(self.model(inputs_of(given)).float().numpy())
        return np.concatenate(found)

    def predict(self, cohort: Cohort, rows: np.ndarray | None = None, batch_size: int = 64) -> np.ndarray:
        """`probabilities` of these rows; with exclusive labels they add up to 1."""
        return self.probabilities(self.logits(cohort, rows, batch_size))

    @torch.no_grad()
    def predict_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Probabilities [N, labels] from texts alone."""
        words_NL, lengths_N = self.vocabulary.inputs(texts, self.longest)
        return self.probabilities(self.model(LdamInputs(words_NL=words_NL, lengths_N=lengths_N)).float().numpy())

    def probabilities(self, logits_NK: np.ndarray) -> np.ndarray:
        """Of logits that the model told: calibrated, where a calibration is known. float64."""
        return self.uncalibrated(logits_NK) if self.calibration is None else self.calibration.probabilities(logits_NK)

    def uncalibrated(self, logits_NK: np.ndarray) -> np.ndarray:
        """Probabilities as the model tells them, float64."""
        given = torch.from_numpy(np.asarray(logits_NK, np.float64))
        return (given.softmax(-1) if self.model.config.exclusive else given.sigmoid()).numpy()


def check_target(directory: Path) -> None:
    """Raises ValueError, naming what would be lost, unless `save_ldam` may write to `directory`."""
    model_files.check_target(directory, FORMAT, (VOCABULARY, STATISTICS))


def save_ldam(directory: Path, trained: TrainedLdam) -> Path:
    """Writes the model, replacing an earlier one; returns the directory. Raises ValueError as `check_target`."""
    content = {
        "format": FORMAT,
        "model": trained.model.config.to_dict(),
        "labels": trained.labels,
        "definitions": trained.definitions,
        "longest": trained.longest,
        "data": trained.data,
        "split": trained.split,
        "metadata": trained.metadata,
        "calibration": None if trained.calibration is None else trained.calibration.to_dict(),
        "evidence": None if trained.evidence is None else trained.evidence.to_dict(),
    }
    check_target(directory)
    statistics = {} if trained.statistics is None else {STATISTICS: trained.statistics.to_dict()}
    return model_files.write(
        directory, content, trained.model, {VOCABULARY: trained.vocabulary.to_dict(), **statistics}
    )


def holds_ldam(directory: Path | str) -> bool:
    """Whether a directory holds what `save_ldam` wrote, damaged or not; errors are `load_ldam`'s to tell."""
    return model_files.holds(directory, FORMAT)


def load_ldam(directory: Path | str) -> TrainedLdam:
    """The model in a directory that `save_ldam` wrote, or in a run directory with such an export. Raises ValueError
    that names the file if one is missing, damaged, or of another format."""
    path = model_files.find(directory)
    content, words = model_files.read(path, FORMAT, KEYS, (VOCABULARY,))
    with model_files.damage(path):
        model, vocabulary = Ldam(LdamConfig.from_dict(content["model"])), Vocabulary.from_dict(words)
        model_files.load_weights(path, model)
        calibration, evidence = content.get("calibration"), content.get("evidence")
        trained = TrainedLdam(
            model,
            vocabulary,
            tuple(content["labels"]),
            tuple(content["definitions"]),
            int(content["longest"]),
            None if not model.config.variables else _statistics(path),
            **{name: dict(content.get(name, {})) for name in ("data", "split", "metadata")},
            calibration=None if calibration is None else LabelCalibration.from_dict(calibration),
            evidence=None if evidence is None else TextEvidence.from_dict(evidence),
        )
    return trained


def _statistics(path: Path) -> Statistics:
    return Statistics.from_dict(read_object(path / STATISTICS))
