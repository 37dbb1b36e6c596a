"""A trained clinical model on disk: config.json, model.safetensors and statistics.json, written atomically.

The statistics of the training rows, the outcome, the calibration and how the data were split travel with the weights,
so that whoever loads the model predicts what the run predicted. Loading cannot run code.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attnzoo.checkpoint import model_files
from attnzoo.clinical import checks
from attnzoo.clinical.calibration import Calibrator
from attnzoo.clinical.cohort import Cohort, chosen_rows
from attnzoo.clinical.evidence import Evidence
from attnzoo.clinical.outcome import Outcome
from attnzoo.clinical.statistics import Statistics
from attnzoo.models import EhrConfig, EhrEncoder

FORMAT = "attnzoo-ehr-1"
STATISTICS = "statistics.json"
KEYS = ("format", "model", "outcome", "data", "split", "metadata", "calibration", "evidence")
"""Keys of config.json."""
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(statistics: Statistics, cohort: Cohort, rows: np.ndarray) -> Inputs:
    """(cells_NTVC, statics_NS, hours_N) of rows of a cohort: what an `EhrEncoder` takes."""
    cells_NTVC, statics_NS = statistics.cells(cohort.grid, rows), statistics.statics(cohort, rows)
    hours_N = np.asarray(cohort.grid.hours_N[rows], np.int64)
    return torch.from_numpy(cells_NTVC), torch.from_numpy(statics_NS), torch.from_numpy(hours_N)


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode with what its predictions depend on.

    data: format and options of the cohort that it learned from. split: which rows of it, with a digest of the stays of
    each part, and digests of the cohort's content. metadata: of the run. calibrator: fitted on the inner validation
    rows; of a yes or no alone. evidence: what is known about the predictions; None in exports of before it was
    measured.
    """

    model: EhrEncoder
    statistics: Statistics
    outcome: Outcome
    data: dict[str, Any] = field(default_factory=dict)
    split: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    calibrator: Calibrator | None = None
    evidence: Evidence | None = None

    def __post_init__(self) -> None:
        if self.calibrator is not None and self.outcome.edges:
            raise ValueError("calibrator: temperature and intercept are those of a yes or no, and outcome has edges")
        wanted = len(self.outcome.edges) + 1
        if self.evidence is not None and len(self.evidence.shares) != wanted:
            raise ValueError(f"evidence.shares has {len(self.evidence.shares)} entries; the outcome has {wanted}")

    def logits(self, cohort: Cohort, rows: np.ndarray | None = None, batch_size: int = 256) -> np.ndarray:
        """[N, outputs] or [N, T, outputs], float32, as the model tells them: not calibrated. Raises ValueError for
        other variables than those of training."""
        rows = chosen_rows(cohort, rows)
        checks.count(batch_size, "batch_size", 1)
        device = next(self.model.parameters()).device
        with torch.no_grad():
            parts = [
                self.model(*(tensor.to(device) for tensor in inputs(self.statistics, cohort, some))).float().cpu()
                for some in _cut(rows, batch_size)
            ]
        return torch.cat(parts).numpy()

    def predict(self, cohort: Cohort, rows: np.ndarray | None = None, batch_size: int = 256) -> np.ndarray:
        """`probabilities` of these rows."""
        return self.probabilities(self.logits(cohort, rows, batch_size))

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Of logits that the model told, calibrated, in the form of `Outcome.probabilities`."""
        return self.outcome.probabilities(logits if self.calibrator is None else self.calibrator.logits(logits))


def _cut(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, max(len(rows), 1), size):  # of no rows one part, so that the shape is known
        yield rows[start : start + size]


def check_target(directory: Path) -> None:
    """Raises ValueError, naming what would be lost, unless `save_trained` may write to `directory`."""
    model_files.check_target(directory, FORMAT, (STATISTICS,))


def save_trained(directory: Path, trained: TrainedModel) -> Path:
    """Writes the model, replacing an earlier one; returns the directory. Raises ValueError as `check_target`."""
    content = {
        "format": FORMAT,
        "model": trained.model.config.to_dict(),
        "outcome": trained.outcome.to_dict(),
        "data": trained.data,
        "split": trained.split,
        "metadata": trained.metadata,
        "calibration": None if trained.calibrator is None else trained.calibrator.to_dict(),
        "evidence": None if trained.evidence is None else trained.evidence.to_dict(),
    }
    return model_files.write(directory, content, trained.model, {STATISTICS: trained.statistics.to_dict()})


def holds_trained(directory: Path | str) -> bool:
    """Whether a directory holds what `save_trained` wrote, damaged or not; errors are `load_trained`'s to tell."""
    return model_files.holds(directory, FORMAT)


def load_trained(directory: Path | str) -> TrainedModel:
    """The model in a directory that `save_trained` wrote, or in a run directory with such an export.

    Raises ValueError that names the file if one is missing, damaged, or of another format.
    """
    path = model_files.find(directory)
    content, statistics = model_files.read(path, FORMAT, KEYS, (STATISTICS,))
    with model_files.damage(path):
        model = EhrEncoder(EhrConfig.from_dict(content["model"]))
        outcome, fitted = Outcome.from_dict(content["outcome"]), Statistics.from_dict(statistics)
        model_files.load_weights(path, model)
        calibration = content.get("calibration")
        calibrator = None if calibration is None else Calibrator.from_dict(calibration)
        known = content.get("evidence")
        evidence = None if known is None else Evidence.from_dict(known)
        parts = {name: dict(content.get(name, {})) for name in ("data", "split", "metadata")}
        trained = TrainedModel(model, fitted, outcome, **parts, calibrator=calibrator, evidence=evidence)
    return trained
