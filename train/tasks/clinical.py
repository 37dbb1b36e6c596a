"""Clinical models: the stays of a cohort on their hourly grid, and a label of each stay or of each of its hours.

A run trains on one fold. It learns from the fold's training rows, standardises by their statistics alone, selects and
calibrates on the inner validation rows; the fold's test rows are never looked at.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from attnzoo.clinical import trained
from attnzoo.clinical.calibration_rule import Fit
from attnzoo.clinical.evidence import MapVerdict, calibrate, judge_maps, measure
from attnzoo.clinical.explain import StayCells
from attnzoo.clinical.faithfulness import passes
from attnzoo.clinical.outcome import Outcome
from attnzoo.clinical.statistics import Statistics
from attnzoo.errors import suggest
from attnzoo.files import user_path
from attnzoo.models import EhrConfig, EhrEncoder
from attnzoo.types import build_config
from train.config import Config
from train.data import Batch
from train.tasks.base import TASKS
from train.tasks.cohort import CohortOptions, CohortTask, check_data, check_precision
from train.tasks.findings import Findings, judging

DERIVED = ("variables", "statics", "outputs", "hourly", "head")
"""Keys of the model that data and outcome determine."""


@dataclass(frozen=True, kw_only=True)
class ClinicalOptions(CohortOptions):
    """label: of the cohort, what is predicted. edges, head, hourly: as in `attnzoo.clinical.outcome.Outcome`.
    explained: inner validation stays on which the export's explanations are judged; 0: none. The others as in
    `train.tasks.cohort.CohortOptions`.
    """

    label: str = "mortality"
    edges: tuple[float, ...] = ()
    head: Literal["linear", "ordinal"] = "ordinal"
    hourly: bool = False
    explained: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.explained < 0:
            raise ValueError(f"task.explained={self.explained} must be at least 0")
        self.outcome()

    def outcome(self) -> Outcome:
        """What is predicted. Raises ValueError."""
        return Outcome(label=self.label, edges=self.edges, head=self.head, hourly=self.hourly)


@TASKS.register("clinical")
class ClinicalTask(CohortTask):
    """An `EhrEncoder` on a cohort. Batches are (cells_NTVC, statics_NS, hours_N, labels): labels [N], or [N, T] where
    they are hourly, float32; NaN does not count. In training the model hides variables and hours itself."""

    options: ClinicalOptions

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.options = build_config(ClinicalOptions, config.task, "task")
        self.outcome = self.options.outcome()
        self.METRICS = self.outcome.metric_names  # type: ignore[misc]

    @classmethod
    def sections(cls, config: Config) -> Mapping[str, Callable[[], object]]:
        """The classes that define the sections' keys."""
        return {
            "task": lambda: build_config(ClinicalOptions, config.task, "task"),
            "precision": lambda: check_precision(config.precision),
            "model": lambda: _check_model(config.model),
            "data": lambda: check_data(config.data),
        }

    # --- before anything is prepared ----------------------------------------------------------------------------

    def check(self) -> None:
        """Reads the cohort, splits it, looks at checkpoint.init_from, and whether stays fit the model."""
        if self.config.checkpoint.init_from is not None:
            self._initial(self.config.checkpoint.init_from)
        self.check_kinds("task.label", {self.options.label: self.outcome.kinds(self.labels)})
        self._check_hours()

    def _check_hours(self) -> None:
        """Raises ValueError where a stay is longer than the model's chunks."""
        model, most = self._model_config(), int(self.cohort.grid.hours_N.max())
        if model.longest is not None and most > model.longest:
            raise ValueError(
                f"model.chunks={model.chunks} of model.chunk_hours={model.chunk_hours} hold {model.longest} hours, and "
                f"a stay has {most}; raise one of them, lower data.hours, or set model.share_fusion=true with at "
                "least model.chunks=2"
            )

    @property
    def strata(self) -> str | None:
        """The label, where it is a yes or no."""
        return None if self.outcome.edges else self.options.label

    @cached_property
    def labels(self) -> np.ndarray:
        """[N] or [N, T]."""
        cohort = self.cohort  # what cannot be read is no fault of the label
        try:
            return self.outcome.labels(cohort)
        except ValueError as error:
            raise ValueError(f"task.label: {error}") from None

    # --- data ---------------------------------------------------------------------------------------------------

    @cached_property
    def statistics(self) -> Statistics:
        """Of the training rows alone."""
        return Statistics.fit(self.cohort, self.fold.train)

    def prepare(self, is_main: bool) -> None:
        """As of every cohort; typical labels are those of training rows."""
        self.outcome = self.outcome.fitted(self.labels[self.fold.train])
        super().prepare(is_main)

    def batch(self, rows: np.ndarray) -> Batch:
        """As the class says."""
        return (*trained.inputs(self.statistics, self.cohort, rows), torch.from_numpy(self.labels[rows]))

    def fitted(self) -> object:
        """The statistics."""
        return self.statistics.to_dict()

    def content(self) -> dict[str, Any]:
        """As of every cohort."""
        return self._content(asdict(self.options), self._model_config().to_dict())

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
        """As `Outcome.loss_sum`, without class weights; the mean over parts that learn from a loss of their own."""
        parts = self._logits(model, batch, each_part=True)
        return torch.stack([self.outcome.loss_sum(part, batch[3]) for part in parts]).mean() / count

    # --- evaluation ---------------------------------------------------------------------------------------------

    def measure(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits [N, outputs], or [N, T, outputs] where they are hourly."""
        return self._logits(model, batch)

    def _logits(self, model: nn.Module, batch: Batch, **options: bool) -> Tensor:
        cells_NTVC, statics_NS, hours_N, _ = batch
        dtype = next(model.parameters()).dtype
        logits: Tensor = model(cells_NTVC.to(dtype), statics_NS.to(dtype), hours_N, **options)
        return logits

    def metrics(self, batch: Batch, measured: Tensor) -> dict[str, float]:
        """As `Outcome.metrics`."""
        return self.outcome.metrics(batch[3], measured)

    def score(self, metrics: dict[str, float]) -> float:
        """As `Outcome.score`."""
        return self.outcome.score(metrics)

    # --- results ------------------------------------------------------------------------------------------------

    def save(self, directory: Path, model: nn.Module, metadata: dict[str, Any]) -> None:
        """As `attnzoo.clinical.trained.load_trained` reads it."""
        whole = trained.TrainedModel(cast(EhrEncoder, model), self.statistics, self.outcome, *self._data_and_split())
        trained.save_trained(directory, self.judged(whole, metadata))

    def part_counts(self, rows: np.ndarray) -> dict[str, Any]:
        """Stays, known labels, and how they are distributed."""
        return {**super().part_counts(rows), **self.outcome.counts(self.labels[rows])}

    @torch.no_grad()
    def judged(self, whole: trained.TrainedModel, metadata: dict[str, Any]) -> trained.TrainedModel:
        """With its calibration, fitted on the inner validation rows, and what is known about its predictions."""
        size = self.config.eval.batch_size
        parts = zip(*(tensor.split(size) for tensor in self._validation), strict=True)
        logits = torch.cat([self.measure(whole.model, part) for part in parts])
        fit = Fit()
        if not self.outcome.edges:
            fit = calibrate(self._validation[3].double().numpy(), logits[..., 0].double().numpy())
        cells_NTVC, statics_NS, hours_N, _ = (tensor[: self.options.explained] for tensor in self._validation)
        seen = StayCells(cells_NTVC, statics_NS, hours_N)
        maps: dict[str, MapVerdict] = {}
        if len(seen) > 1:
            with judging(self.config, f"{len(seen):,} stays", passes(2)) as tick:
                maps = judge_maps(whole.model, self.outcome, seen, tick)
        served = None
        if fit.calibrator is not None:
            served = self.metrics(self._validation, torch.from_numpy(fit.calibrator.logits(logits.numpy())))
        self.findings = Findings.of(served, {"the model": fit.refused}, (one.words for one in maps.values()))
        evidence = measure(self.outcome, self.labels[self.fold.train], len(logits), fit, maps)
        told = self.findings.metadata(metadata)
        return replace(whole, metadata=told, calibrator=fit.calibrator, evidence=evidence)


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
