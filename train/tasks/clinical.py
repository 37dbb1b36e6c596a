"""Clinical models: the stays of a cohort on their hourly grid, and a label of each stay or of each of its hours.

A run trains on one fold. It learns from the fold's training rows, standardises by their statistics alone, selects and
calibrates on the inner validation rows; the fold's test rows are never looked at.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from attnzoo.clinical import trained
from attnzoo.clinical.agreement import weighted_kappa
from attnzoo.clinical.calibration import Calibrator, fit_calibrator
from attnzoo.clinical.cohort import Cohort
from attnzoo.clinical.formats import check_options, load_cohort
from attnzoo.clinical.metrics import auprc, auroc, brier, mean_absolute_deviation, score_1
from attnzoo.clinical.outcome import Outcome
from attnzoo.clinical.splits import Fold, folds, time_split
from attnzoo.clinical.statistics import Statistics
from attnzoo.errors import suggest
from attnzoo.files import user_path
from attnzoo.models import EhrConfig, EhrEncoder
from attnzoo.types import CheckedConfig, build_config
from train.config import Config
from train.data import Batch
from train.data.loader import EpochStream
from train.tasks.base import TASKS, Task, TaskOptions

DERIVED = ("variables", "statics", "outputs", "hourly", "head")
"""Keys of the model that data and outcome determine."""


@dataclass(frozen=True, kw_only=True)
class ClinicalOptions(TaskOptions, CheckedConfig):
    """label: of the cohort, what is predicted. edges, head, hourly: as in `attnzoo.clinical.outcome.Outcome`.

    split: of the cohort by patient, by stay, or in time. folds: their number; fold: the one whose test rows are left
    out, from 0; validation: the share of the other rows that selects. split_seed: of the folds; runs with other seeds
    have the same folds.
    """

    label: str = "mortality"
    edges: tuple[float, ...] = ()
    head: Literal["linear", "ordinal"] = "ordinal"
    hourly: bool = False
    split: Literal["patient", "stay", "time"] = "patient"
    folds: int = 5
    fold: int = 0
    validation: float = 0.125
    split_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split != "time" and not 0 <= self.fold < self.folds:
            raise ValueError(f"task.fold={self.fold} must be from 0 to {self.folds - 1}")
        if not 0 < self.validation < 1:
            raise ValueError(f"task.validation={self.validation} must be between 0 and 1; nothing else selects")
        self.outcome()

    def outcome(self) -> Outcome:
        """What is predicted. Raises ValueError."""
        return Outcome(label=self.label, edges=self.edges, head=self.head, hourly=self.hourly)


class StayStream(EpochStream):
    """Batches of stays: every row once an epoch."""

    def __init__(self, rows: np.ndarray, seed: int, batch_of: Callable[[np.ndarray], Batch]) -> None:
        self._stays, self._batch_of = rows, batch_of
        super().__init__(seed)

    def epoch(self, random: np.random.Generator) -> np.ndarray:
        """The training rows, shuffled."""
        return random.permutation(self._stays)

    def batch(self, rows: np.ndarray) -> Batch:
        """As `ClinicalTask`."""
        return self._batch_of(rows)

    def too_few(self, wanted: int, rows: int) -> str:
        """Advice for a small cohort."""
        return f"one global batch takes {wanted} stays and the training part has {rows}; lower train.batch_size"


@TASKS.register("clinical")
class ClinicalTask(Task):
    """An `EhrEncoder` on a cohort. Batches are (cells_NTVC, statics_NS, hours_N, labels): labels [N], or [N, T] where
    they are hourly, float32; NaN does not count. In training the model hides variables and hours itself."""

    ROW = UNIT = "stay"
    UNUSED: ClassVar[tuple[str, ...]] = (
        "tokenizer",
        "lora",
        "sample",
        "checkpoint.adopt_model",
        "train.activation_checkpointing",
        "eval.below_ngrams",
    )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.options = build_config(ClinicalOptions, config.task, "task")
        self.outcome = self.options.outcome()
        names = ("kappa", "mad") if self.outcome.edges else ("auroc", "auprc", "score_1", "brier")
        self.METRICS = ("loss", *names)  # type: ignore[misc]
        self.preparing = f"the stays of data.path={config.data.get('path')!r}"
        self._rows = np.zeros(0, np.int64)
        self._validation: Batch = ()

    @classmethod
    def sections(cls, config: Config) -> Mapping[str, Callable[[], object]]:
        """The classes that define the sections' keys."""
        return {
            "task": lambda: build_config(ClinicalOptions, config.task, "task"),
            "precision": lambda: _check_precision(config.precision),
            "model": lambda: _check_model(config.model),
            "data": lambda: _check_data(config.data),
        }

    # --- before anything is prepared ----------------------------------------------------------------------------

    def check(self) -> None:
        """Reads the cohort, splits it, and looks at checkpoint.init_from."""
        if self.config.checkpoint.init_from is not None:
            self._initial(self.config.checkpoint.init_from)
        labels, validation = self._labels, self.fold.validation
        known = labels[validation][~np.isnan(labels[validation])]
        if not len(known) or (not self.outcome.edges and known.min() == known.max()):
            raise ValueError(
                f"the validation part of {len(validation)} stays has no {self.options.label!r} of both kinds to select "
                "by; raise task.validation, or take fewer task.folds"
            )

    @cached_property
    def cohort(self) -> Cohort:
        """The whole cohort; read once, and never written anywhere."""
        options = {key: value for key, value in self.config.data.items() if key not in ("format", "path")}
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
        return load_cohort(self.config.data["format"], user_path(self.config.data["path"], "data.path"), **given)

    @cached_property
    def _labels(self) -> np.ndarray:
        try:
            return self.outcome.labels(self.cohort)
        except ValueError as error:
            raise ValueError(f"task.label: {error}") from None

    @cached_property
    def fold(self) -> Fold:
        """The rows of the run's fold that have a label. Raises ValueError that names `task.split`."""
        options, label = self.options, None if self.outcome.edges else self.options.label
        try:
            if options.split == "time":
                found = time_split(self.cohort, validation=options.validation)
            else:
                found = folds(
                    self.cohort,
                    options.folds,
                    by=options.split,
                    label=label,
                    seed=options.split_seed,
                    validation=options.validation,
                )[options.fold]
        except ValueError as error:
            raise ValueError(f"task.split={options.split}: {error}") from None
        known_N = ~np.isnan(self._labels.reshape(len(self._labels), -1)).all(axis=1)
        return Fold(*(rows[known_N[rows]] for rows in (found.train, found.validation, found.test)))

    # --- data ---------------------------------------------------------------------------------------------------

    @cached_property
    def statistics(self) -> Statistics:
        """Of the training rows alone."""
        return Statistics.fit(self.cohort, self.fold.train)

    def prepare(self, is_main: bool) -> None:
        """Everything is in memory; each rank reads the files."""
        self.outcome = self.outcome.fitted(self._labels[self.fold.train])
        self.train = StayStream(self.fold.train, self.config.seed, self._batch)
        self._validation = self._batch(self.fold.validation)

    def _batch(self, rows: np.ndarray) -> Batch:
        return (*trained.inputs(self.statistics, self.cohort, rows), torch.from_numpy(self._labels[rows]))

    def content(self) -> dict[str, Any]:
        """All options, and a digest of the cohort, its parts and the statistics."""
        cohort, whole = self.cohort, hashlib.sha256(self._split_digest().encode())
        for array in (cohort.grid.values_NTV, cohort.grid.counts_NTV, cohort.grid.hours_N, cohort.statics_NS):
            whole.update(np.ascontiguousarray(array).tobytes())
        whole.update(np.ascontiguousarray(self._labels).tobytes())
        whole.update(json.dumps(self.statistics.to_dict()).encode())
        return {
            **{f"task.{key}": value for key, value in asdict(self.options).items()},
            **{f"model.{key}": value for key, value in self._model_config().to_dict().items()},
            **{f"data.{key}": value for key, value in self.config.data.items() if key != "path"},
            "data (content)": whole.hexdigest()[:16],
        }

    def _split_digest(self) -> str:
        """Of the stays of each part, by their identifiers."""
        ids, fold = np.array(self.cohort.stay_ids), self.fold
        parts = [ids[rows].tolist() for rows in (fold.train, fold.validation, fold.test)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def validation(self, most: int | None = None) -> Batch:
        """The inner validation rows, or `most` of them, spread evenly."""
        rows = len(self._validation[0])
        if most is None or most >= rows:
            return self._validation
        chosen = torch.arange(most) * rows // most
        return tuple(tensor[chosen] for tensor in self._validation)

    # --- model and loss -----------------------------------------------------------------------------------------

    def _model_config(self) -> EhrConfig:
        derived = {
            "variables": len(self.cohort.grid.variables),
            "statics": len(self.statistics.static_columns),
            "outputs": self.outcome.outputs,
            "hourly": self.outcome.hourly,
            "head": "ordinal" if self.outcome.ordinal else "linear",
        }
        return EhrConfig.from_dict({**self.config.model, **derived})

    def model(self) -> nn.Module:
        """New weights, or those of checkpoint.init_from."""
        model, checkpoint = self.encoder(), self.config.checkpoint.init_from
        if checkpoint is not None:
            model.load_state_dict(self._initial(checkpoint).state_dict())
        return model

    def encoder(self) -> EhrEncoder:
        """New weights."""
        return EhrEncoder(self._model_config())

    def _initial(self, checkpoint: str) -> EhrEncoder:
        """The model of an export of the same fold. Raises ValueError if it is another one, or has seen other stays."""
        given = trained.load_trained(user_path(checkpoint, "checkpoint.init_from"))
        if given.split.get("digest") != self._split_digest() or given.statistics != self.statistics:
            raise ValueError(
                f"checkpoint.init_from={checkpoint} learned from other stays than this run's training part, perhaps "
                "from its test rows; take a model of the same data, task.fold and task.split_seed"
            )
        theirs, mine = given.model.config.to_dict(), self._model_config().to_dict()
        for key in mine:
            if theirs[key] != mine[key] and key not in ("dropout", "hide_variables", "hide_hours"):
                raise ValueError(
                    f"checkpoint.init_from={checkpoint} has model.{key}={theirs[key]!r} and this run has "
                    f"{mine[key]!r}; set it to the checkpoint's"
                )
        return given.model

    def count(self, batch: Batch) -> int:
        """Labels that are known: stays, or hours of them."""
        return int((~torch.isnan(batch[3])).sum())

    def loss(self, model: nn.Module, batch: Batch, count: Tensor) -> Tensor:
        """As `Outcome.loss_sum`, without class weights."""
        return self.outcome.loss_sum(self.measure(model, batch), batch[3]) / count

    # --- evaluation ---------------------------------------------------------------------------------------------

    def measure(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits [N, outputs], or [N, T, outputs] where they are hourly."""
        cells_NTVC, statics_NS, hours_N, _ = batch
        dtype = next(model.parameters()).dtype
        logits: Tensor = model(cells_NTVC.to(dtype), statics_NS.to(dtype), hours_N)
        return logits

    def metrics(self, batch: Batch, measured: Tensor) -> dict[str, float]:
        """Of yes or no: AUROC, AUPRC, Score 1, Brier; of buckets: linear kappa, and the mean absolute deviation of the
        bucket's typical label. Each hour counts alike."""
        labels, logits = batch[3], measured
        if not bool(torch.isfinite(logits).all()):
            return dict.fromkeys(self.METRICS, float("nan"))
        loss = float(self.outcome.loss_sum(logits, labels)) / self.count(batch)
        known = ~torch.isnan(labels)
        label_K, logits_KO = labels[known].numpy(), logits[known].numpy()
        if not self.outcome.edges:
            found_K = self.outcome.probabilities(logits_KO)
            kinds = {"auroc": auroc, "auprc": auprc, "score_1": score_1, "brier": brier}
            return {"loss": loss, **{name: metric(label_K, found_K) for name, metric in kinds.items()}}
        edges = self.outcome.edges
        kappa = weighted_kappa(range(len(edges) + 1), "linear")
        found_K, true_K = self.outcome.buckets(logits_KO), np.searchsorted(edges, label_K, side="right")
        told_K = np.array(self.outcome.centers)[found_K]
        return {"loss": loss, "kappa": kappa(true_K, found_K), "mad": mean_absolute_deviation(label_K, told_K)}

    def score(self, metrics: dict[str, float]) -> float:
        """AUPRC + AUROC, or kappa."""
        return metrics["kappa"] if self.outcome.edges else metrics["auprc"] + metrics["auroc"]

    # --- results ------------------------------------------------------------------------------------------------

    def check_target(self, directory: Path) -> None:
        """Only an earlier model of its format is replaced."""
        trained.check_target(directory)

    def save(self, directory: Path, model: nn.Module, metadata: dict[str, Any]) -> None:
        """As `attnzoo.clinical.trained.load_trained` reads it."""
        options = self.options
        split = {name: getattr(options, name) for name in ("split", "folds", "fold", "validation", "split_seed")}
        data = {key: value for key, value in self.config.data.items() if key != "path"}
        whole = trained.TrainedModel(
            cast(EhrEncoder, model),
            self.statistics,
            self.outcome,
            {**data, "cohort": self.cohort.name, "hours": self.cohort.grid.hours},
            {**split, "digest": self._split_digest()},
            metadata,
            self.calibrator(model),
        )
        trained.save_trained(directory, whole)

    @torch.no_grad()
    def calibrator(self, model: nn.Module) -> Calibrator | None:
        """Temperature and intercept of a yes or no, fitted on the inner validation rows; None for buckets."""
        if self.outcome.edges:
            return None
        labels, size = self._validation[3], self.config.eval.batch_size
        parts = zip(*(tensor.split(size) for tensor in self._validation), strict=True)
        logits, known = torch.cat([self.measure(model, part) for part in parts]), ~torch.isnan(labels)
        return fit_calibrator(labels[known].numpy(), logits[known][:, 0].numpy())

    def summary(self) -> dict[str, Any]:
        """Stays of each part; what became of the values that were read."""
        train, validation = self.fold.train, self.fold.validation
        report = self.cohort.report.to_dict()
        return {"training_stays": len(train), "validation_stays": len(validation), "data": report}


def _check_precision(precision: str) -> None:
    """Raises ValueError for weights in bfloat16."""
    if precision == "bf16":
        raise ValueError(f"precision={precision}: the clinical encoder has float32 weights; use fp32 or bf16_autocast")


def _check_model(values: Mapping[str, Any]) -> None:
    """Raises ValueError that names the key of `model`."""
    for key in DERIVED:
        if key in values:
            raise ValueError(f"model.{key}={values[key]!r}: the cohort and the task determine it; leave it out")
    known = [f.name for f in fields(EhrConfig) if f.name not in DERIVED]
    for key in values:
        if key not in known:
            raise ValueError(f"unknown key model.{key}{suggest(str(key), known)}")
    EhrConfig.from_dict({"variables": 1, **values})


def _check_data(values: Mapping[str, Any]) -> None:
    """Raises ValueError that names the key of `data`, without reading a file."""
    for key, meaning in (("format", "the name of a data format"), ("path", "the place of the data set")):
        if not isinstance(values.get(key), str):
            raise ValueError(f"data.{key}={values.get(key)!r} must be {meaning}")
    try:
        check_options(values["format"], [key for key in values if key not in ("format", "path")])
    except ValueError as error:
        raise ValueError(f"data: {error}") from None
