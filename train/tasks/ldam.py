"""LDAM: labels of stays, read from their texts (and series, where there are any) beside the labels' definitions."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from attnzoo.clinical import trained_ldam
from attnzoo.clinical.definitions import definitions
from attnzoo.clinical.evidence import MapVerdict
from attnzoo.clinical.explain_words import TextWords, judge_word_maps
from attnzoo.clinical.faithfulness import passes
from attnzoo.clinical.label_calibration import fit_label_calibration
from attnzoo.clinical.metrics import macro_auroc
from attnzoo.clinical.statistics import Statistics
from attnzoo.clinical.text_evidence import measure_texts
from attnzoo.clinical.trained_ldam import TrainedLdam, inputs_of, save_ldam
from attnzoo.clinical.variables import VARIABLES
from attnzoo.clinical.words import Vocabulary, cooccurrence_vectors
from attnzoo.errors import suggest
from attnzoo.models import Ldam, LdamConfig
from attnzoo.types import build_config
from train.config import Config
from train.data import Batch
from train.tasks.base import TASKS
from train.tasks.cohort import CohortOptions, CohortTask, check_data, check_precision
from train.tasks.findings import Findings, judging

DERIVED = ("vocab_size", "definitions", "variables", "channels")
"""Keys of the model that data and labels determine."""


@dataclass(frozen=True, kw_only=True)
class LdamOptions(CohortOptions):
    """labels: of the cohort, 0 or 1 for each stay; null: all of them. definitions: what labels mean, by their names,
    where `attnzoo.clinical.definitions` has no text or another one is wanted. least: texts of training rows in which a
    word must stand to be in the vocabulary. longest: tokens of a text that are read. vectors: what words begin with,
    vectors from their neighbours in training texts, or random ones. explained: inner validation texts on which the
    export's explanations are judged; 0: none. The others as in `train.tasks.cohort.CohortOptions`.
    """

    split: Literal["patient", "stay"] = "patient"
    labels: tuple[str, ...] | None = None
    definitions: dict = field(default_factory=dict)
    least: int = 2
    longest: int = 256
    vectors: Literal["cooccurrence", "random"] = "cooccurrence"
    explained: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.explained < 0:
            raise ValueError(f"task.explained={self.explained} must be at least 0")
        for name in ("least", "longest"):
            if getattr(self, name) < 1:
                raise ValueError(f"task.{name}={getattr(self, name)} must be at least 1")
        for label, text in self.definitions.items():
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"task.definitions.{label}={text!r} must say in words what the label means")


@TASKS.register("ldam")
class LdamTask(CohortTask):
    """An `Ldam` on a cohort. Batches are (words_NL, lengths_N, cells_NTVC, hours_N, labels_NK), without cells and hours
    where the cohort has no variables. In training the model hides words itself."""

    UNUSED: ClassVar[tuple[str, ...]] = (*CohortTask.UNUSED, "checkpoint.init_from")
    options: LdamOptions

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.options = build_config(LdamOptions, config.task, "task")
        self.exclusive = bool(config.model.get("exclusive", False))
        accuracy = ("accuracy",) if self.exclusive else ()
        self.METRICS = ("loss", "macro_auroc", *accuracy)  # type: ignore[misc]

    @classmethod
    def sections(cls, config: Config) -> Mapping[str, Callable[[], object]]:
        """The classes that define the sections' keys."""
        return {
            "task": lambda: build_config(LdamOptions, config.task, "task"),
            "precision": lambda: check_precision(config.precision),
            "model": lambda: _check_model(config.model),
            "data": lambda: check_data(config.data),
        }

    # --- data ---------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Reads the cohort and splits it; looks at its texts and labels."""
        if self.cohort.texts is None:
            raise ValueError(
                f"task.kind=ldam reads texts, and data.format={self.config.data['format']} has none; take mts_dialog, "
                "or eicu with data.texts=true"
            )
        self.check_kinds("task.labels", dict(zip(self.names, self.labels.T, strict=True)), all_of_them=False)
        if self.exclusive and not (np.nansum(self.labels, axis=1) == 1).all():
            raise ValueError("model.exclusive=true: some stays have no label or several; set it to false")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The labels."""
        return tuple(self.cohort.labels) if self.options.labels is None else self.options.labels

    @property
    def strata(self) -> tuple[str, ...]:
        """All labels."""
        return self.names

    @cached_property
    def labels(self) -> np.ndarray:
        """[N, K]."""
        try:
            columns = [np.asarray(self.cohort.label(name), np.float32) for name in self.names]
        except ValueError as error:
            raise ValueError(f"task.labels: {error}") from None
        for name, column in zip(self.names, columns, strict=True):
            if column.ndim != 1 or not np.isin(column, (0, 1)).all():
                raise ValueError(f"task.labels: {name!r} is not one 0 or 1 for each stay; name such labels")
        if not columns:
            raise ValueError(f"task.labels: cohort {self.cohort.name!r} has no label to predict")
        return np.stack(columns, axis=1)

    @cached_property
    def told(self) -> tuple[str, ...]:
        """The labels' definitions, in words. Raises ValueError."""
        return definitions(self.names, self.options.definitions)

    @cached_property
    def _described(self) -> tuple[str, ...]:
        """The variables of the series, in words."""
        names = self.cohort.grid.variables
        return tuple(VARIABLES[name].meaning if name in VARIABLES else name for name in names)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Of the training rows' texts, of definitions and of descriptions, and of nothing else."""
        also = (*self.told, *self._described)
        return Vocabulary.fit(self._texts(self.fold.train), least=self.options.least, also=also)

    @cached_property
    def statistics(self) -> Statistics | None:
        """Of the series of training rows; None without variables."""
        return Statistics.fit(self.cohort, self.fold.train) if self.cohort.grid.variables else None

    def _texts(self, rows: np.ndarray) -> list[str]:
        assert self.cohort.texts is not None
        return [self.cohort.texts[row] for row in rows]

    @cached_property
    def _trained(self) -> TrainedLdam:
        """What turns rows into tensors; its model has no storage."""
        model = cast(Ldam, self.shapes())
        return TrainedLdam(model, self.vocabulary, self.names, self.told, self.options.longest, self.statistics)

    def batch(self, rows: np.ndarray) -> Batch:
        """As the class says."""
        return (*self._trained.inputs(self.cohort, rows), torch.from_numpy(self.labels[rows]))

    def fitted(self) -> object:
        """The vocabulary, the statistics and the definitions."""
        statistics = None if self.statistics is None else self.statistics.to_dict()
        return [self.vocabulary.to_dict(), statistics, self.told]

    def content(self) -> dict[str, Any]:
        """As of every cohort."""
        model = self._model_config().to_dict()
        return self._content(asdict(self.options), {key: model[key] for key in model if key not in DERIVED})

    # --- model and loss -----------------------------------------------------------------------------------------

    def _model_config(self) -> LdamConfig:
        encode = self.vocabulary.encode
        derived = {
            "vocab_size": len(self.vocabulary),
            "definitions": tuple(tuple(encode(text)) for text in self.told),
            "variables": tuple(tuple(encode(text)) for text in self._described),
        }
        return LdamConfig.from_dict({**self.config.model, **derived})

    def model(self) -> Ldam:
        """New weights; words begin with the vectors that `task.vectors` names."""
        made = Ldam(self._model_config())
        if made.head.weight.is_meta:
            return made
        texts = [self.vocabulary.encode(text) for text in (*self._texts(self.fold.train), *self.told)]
        with torch.no_grad():
            if self.options.vectors == "cooccurrence":
                made.text.embedding.weight.copy_(
                    cooccurrence_vectors(texts, len(self.vocabulary), made.config.model_dim)
                )
            if made.config.skip:
                made.get_buffer("rarity_W").copy_(rarity(texts, len(self.vocabulary)))
        return made

    def loss(self, model: nn.Module, batch: Batch, count: Tensor) -> Tensor:
        """As `Ldam.loss`, weighted by the stays."""
        inputs = inputs_of(_in_dtype(batch[:-1], model))
        return cast(Ldam, model).loss(inputs, batch[-1]) * (len(batch[-1]) / count)

    def measure(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits [N, K]."""
        logits: Tensor = model(inputs_of(_in_dtype(batch[:-1], model)))
        return logits

    def metrics(self, batch: Batch, measured: Tensor) -> dict[str, float]:
        """loss: without the definitions' part. macro_auroc: of the labels that some rows have and some lack. accuracy:
        of the likeliest label, where labels exclude one another."""
        logits_NK, labels_NK = measured.float(), batch[-1]
        if not bool(torch.isfinite(logits_NK).all()):
            return dict.fromkeys(self.METRICS, float("nan"))
        told = self._trained.model.cross_entropy(logits_NK, labels_NK)
        found_NK = self._trained.probabilities(logits_NK.numpy())
        found = {"loss": float(told), "macro_auroc": macro_auroc(1)(labels_NK.numpy(), found_NK)}
        if self.exclusive:
            found["accuracy"] = float((logits_NK.argmax(1) == labels_NK.argmax(1)).double().mean())
        return found

    def score(self, metrics: dict[str, float]) -> float:
        """Macro AUROC, and accuracy where there is one."""
        return metrics["macro_auroc"] + metrics.get("accuracy", 0.0)

    # --- results ------------------------------------------------------------------------------------------------

    def check_target(self, directory: Path) -> None:
        """Only an earlier model of its format is replaced."""
        trained_ldam.check_target(directory)

    def save(self, directory: Path, model: nn.Module, metadata: dict[str, Any]) -> None:
        """As `attnzoo.clinical.trained_ldam.load_ldam` reads it."""
        made = replace(self._trained, model=cast(Ldam, model))
        data, split = self._data_and_split()
        save_ldam(directory, self._judged(replace(made, data=data, split=split), metadata))

    @torch.no_grad()
    def _judged(self, whole: TrainedLdam, metadata: dict[str, Any]) -> TrainedLdam:
        """With its calibration, fitted on the inner validation rows, and what is known about predictions."""
        size, labels_NK = self.config.eval.batch_size, self._validation[-1]
        parts = zip(*(tensor.split(size) for tensor in self._validation), strict=True)
        logits_NK = torch.cat([self.measure(whole.model, part) for part in parts]).float()
        fit = fit_label_calibration(labels_NK.numpy(), logits_NK.numpy(), exclusive=self.exclusive, row=self.ROW)
        words_NL, lengths_N, *series = (tensor[: self.options.explained] for tensor in self._validation[:-1])
        seen = TextWords(words_NL, lengths_N, logits_NK[: self.options.explained].argmax(1), *series)
        maps: dict[str, MapVerdict] = {}
        if len(seen) > 1:
            with judging(self.config, f"{len(seen):,} texts", passes(2)) as tick:
                maps = judge_word_maps(whole.model, seen, tick)
        served = None
        if any(one is not None for one in fit.calibrators):
            served = self.metrics(self._validation, torch.from_numpy(fit.logits(logits_NK.numpy())))
        names = ("the model",) if self.exclusive else tuple(f"the label {name!r}" for name in self.names)
        self.findings = Findings.of(
            served, dict(zip(names, fit.refused, strict=True)), (one.words for one in maps.values())
        )
        texts = self._texts(self.fold.validation)
        evidence = measure_texts(self.labels[self.fold.train], texts, whole.vocabulary, whole.longest, maps)
        return replace(whole, metadata=self.findings.metadata(metadata), calibration=fit, evidence=evidence)


def rarity(texts: list[list[int]], words: int) -> Tensor:
    """Inverse document frequencies [W]: 1 + log((1 + texts) / (1 + texts with the word))."""
    with_word_W = torch.zeros(words)
    for ids in texts:
        with_word_W[torch.as_tensor(sorted(set(ids)), dtype=torch.int64)] += 1
    return 1.0 + ((1.0 + len(texts)) / (1.0 + with_word_W)).log()


def _in_dtype(tensors: tuple[Tensor, ...], model: nn.Module) -> tuple[Tensor, ...]:
    dtype = next(model.parameters()).dtype
    return tuple(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors)


def _check_model(values: Mapping[str, Any]) -> None:
    """Raises ValueError that names the key of `model`."""
    for key in DERIVED:
        if key in values:
            raise ValueError(f"model.{key}={values[key]!r}: the cohort and the task determine it; leave it out")
    known = [f.name for f in fields(LdamConfig) if f.name not in DERIVED]
    for key in values:
        if key not in known:
            raise ValueError(f"unknown key model.{key}{suggest(str(key), known)}")
    LdamConfig.from_dict({"vocab_size": 1, "definitions": ((0,),), **values})
