"""What tasks on a cohort of patients share: its rows, its split, and their batches.

A run trains on one fold. It learns from the fold's training rows and selects on the inner validation rows; the fold's
test rows are never looked at.
"""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from attnzoo.clinical import trained
from attnzoo.clinical.cohort import Cohort
from attnzoo.clinical.content import content_digests
from attnzoo.clinical.formats import check_options, load_cohort, row_name
from attnzoo.clinical.splits import Fold, digest_of, fold_of_run
from attnzoo.clinical.statistics import missing
from attnzoo.files import user_path
from attnzoo.report import counted
from attnzoo.types import CheckedConfig
from train.config import Config
from train.data import Batch
from train.data.loader import EpochStream
from train.tasks.base import Task, TaskOptions

SPLIT = ("split", "folds", "fold", "validation", "split_seed")
"""Options that say how a cohort is split; they travel with the export."""


@dataclass(frozen=True, kw_only=True)
class CohortOptions(TaskOptions, CheckedConfig):
    """split: of the cohort by patient, by stay, or in time. folds: their number; fold: the one whose test rows are left
    out, from 0; validation: the share of the other rows that selects. split_seed: of the folds; runs with other seeds
    have the same folds.
    """

    split: Literal["patient", "stay", "time"] = "patient"
    folds: int = 5
    fold: int = 0
    validation: float = 0.125
    split_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split == "time":
            defaults = {field.name: field.default for field in fields(CohortOptions)}
            for name in ("folds", "fold", "split_seed"):
                if getattr(self, name) != defaults[name]:
                    raise ValueError(
                        f"task.{name}={getattr(self, name)} is of no use with task.split=time: its test part is the "
                        "last dates; leave it out"
                    )
        elif not 0 <= self.fold < self.folds:
            raise ValueError(f"task.fold={self.fold} must be from 0 to {self.folds - 1}")
        if not 0 < self.validation < 1:
            raise ValueError(f"task.validation={self.validation} must be between 0 and 1; nothing else selects")


class StayStream(EpochStream):
    """Batches of stays: every row once an epoch. row: what one is, in words."""

    def __init__(self, rows: np.ndarray, seed: int, batch_of: Callable[[np.ndarray], Batch], row: str) -> None:
        self._stays, self._batch_of, self._row = rows, batch_of, row
        super().__init__(seed)

    def epoch(self, random: np.random.Generator) -> np.ndarray:
        """The training rows, shuffled."""
        return random.permutation(self._stays)

    def batch(self, rows: np.ndarray) -> Batch:
        """As the task makes them."""
        return self._batch_of(rows)

    def too_few(self, wanted: int, rows: int) -> str:
        """Advice for a small cohort."""
        return too_few_rows(wanted, rows, self._row)


def too_few_rows(wanted: int, rows: int, row: str) -> str:
    """That a training part is too small."""
    return f"one global batch takes {counted(wanted, row)} and the training part has {rows:,}; lower train.batch_size"


class CohortTask(Task):
    """A model of the stays of a cohort. A subclass says what is predicted of a stay and makes batches of rows."""

    ROW = UNIT = "stay"
    UNUSED: ClassVar[tuple[str, ...]] = (
        "tokenizer",
        "lora",
        "sample",
        "checkpoint.adopt_model",
        "train.activation_checkpointing",
        "eval.below_ngrams",
    )
    options: CohortOptions

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.ROW = self.UNIT = row_name(str(config.data.get("format")))
        self.preparing = f"the {self.ROW}s of data.path={config.data.get('path')!r}"
        self._validation: Batch = ()

    # --- what a subclass says -----------------------------------------------------------------------------------

    @property
    @abstractmethod
    def strata(self) -> str | tuple[str, ...] | None:
        """The 0/1 labels whose shares are the same in all folds."""

    @property
    @abstractmethod
    def labels(self) -> np.ndarray:
        """float32 [N, ...]; NaN where there is none: rows without any are left out."""

    @abstractmethod
    def batch(self, rows: np.ndarray) -> Batch:
        """The batch of some rows of the cohort."""

    @abstractmethod
    def fitted(self) -> object:
        """What was learned from training rows before the training, as JSON can hold it."""

    # --- rows ---------------------------------------------------------------------------------------------------

    @cached_property
    def cohort(self) -> Cohort:
        """The whole cohort; read once, and never written anywhere."""
        options = {key: value for key, value in self.config.data.items() if key not in ("format", "path")}
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
        path = user_path(self.config.data["path"], "data.path")
        if not path.exists():
            raise ValueError(f"data.path={path} does not exist; give the path of the data set in its original format")
        return load_cohort(self.config.data["format"], path, **given)

    @cached_property
    def fold(self) -> Fold:
        """The rows of the run's fold that have a label. Raises ValueError that names `task.split`."""
        split, labels = {name: getattr(self.options, name) for name in SPLIT}, self.labels
        try:
            return fold_of_run(self.cohort, split, label=self.strata, labels=labels)
        except ValueError as error:
            raise ValueError(f"task.split={self.options.split}: {error}") from None

    def check_kinds(self, key: str, kinds: Mapping[str, np.ndarray], all_of_them: bool = True) -> None:
        """Raises ValueError where a label, or without all_of_them each of several, is of one kind alone: in the cohort,
        where nothing could be learned, in what is learned from, or in what selects. kinds: [N, ...] by label, NaN where
        there is none."""
        parts = {"cohort": np.arange(len(self.cohort)), "training part": self.fold.train}
        for part, rows in (parts | {"validation part": self.fold.validation}).items():
            alike = [name for name, of_label in kinds.items() if len(_known(of_label[rows])) < 2]
            if alike and (all_of_them or len(alike) == len(kinds)):
                found = _known(kinds[alike[0]][rows])
                raise ValueError(_of_one_kind(key, alike[0], found, f"{part} of {counted(len(rows), self.ROW)}"))

    def check_rows(self) -> None:
        """As the class says."""
        wanted, rows = self.config.train.batch_size, len(self.fold.train)
        if rows < wanted:
            raise ValueError(too_few_rows(wanted, rows, self.ROW))

    def prepare(self, is_main: bool) -> None:
        """Everything is in memory; each rank reads the files."""
        self.train = StayStream(self.fold.train, self.config.seed, self.batch, self.ROW)
        self._validation = self.batch(self.fold.validation)

    def validation(self, most: int | None = None) -> Batch:
        """The inner validation rows, or `most` of them, spread evenly."""
        rows = len(self._validation[0])
        if most is None or most >= rows:
            return self._validation
        chosen = torch.arange(most) * rows // most
        return tuple(tensor[chosen] for tensor in self._validation)

    # --- what travels with a run --------------------------------------------------------------------------------

    def _content(self, options: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
        """All options, and a digest of the cohort, its parts and what was fitted on them."""
        cohort, whole = self.cohort, hashlib.sha256(self._split_digest().encode())
        for array in (cohort.grid.values_NTV, cohort.grid.counts_NTV, cohort.grid.hours_N, cohort.statics_NS):
            whole.update(np.ascontiguousarray(array).tobytes())
        whole.update(np.ascontiguousarray(self.labels).tobytes())
        if cohort.texts is not None:
            whole.update(json.dumps(cohort.texts).encode())
        whole.update(json.dumps(self.fitted()).encode())
        return {
            **{f"task.{key}": value for key, value in options.items()},
            **{f"model.{key}": value for key, value in model.items()},
            **{f"data.{key}": value for key, value in self.config.data.items() if key != "path"},
            "data (content)": whole.hexdigest()[:16],
        }

    def _split_digest(self) -> str:
        """Of the stays of each part."""
        return digest_of(self.cohort, self.fold)

    def _data_and_split(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(format and options of the cohort, which rows of it the run had), for the export."""
        data = {key: value for key, value in self.config.data.items() if key != "path"}
        split = {name: getattr(self.options, name) for name in SPLIT}
        return (
            {**data, "cohort": self.cohort.name, "hours": self.cohort.grid.hours},
            {**split, "digest": self._split_digest(), "content": content_digests(self.cohort, self.labels)},
        )

    def check_target(self, directory: Path) -> None:
        """Only an earlier model of its format is replaced."""
        trained.check_target(directory)

    def part_counts(self, rows: np.ndarray) -> dict[str, Any]:
        """What a data card says of a part: how many stays, and more where a subclass knows it."""
        return {"stays": len(rows)}

    def summary(self) -> dict[str, Any]:
        """Stays of each part; what became of the values that were read; what is missing in the training part."""
        fold, report = self.fold, self.cohort.report.to_dict()
        parts = {"training": fold.train, "inner validation": fold.validation, "test": fold.test}
        report["parts"] = {name: self.part_counts(rows) for name, rows in parts.items()}
        report["missing"] = missing(self.cohort.grid, fold.train)
        return {"training_stays": len(fold.train), "validation_stays": len(fold.validation), "data": report}


def _known(labels: np.ndarray) -> np.ndarray:
    """The kinds that there are."""
    return np.unique(labels[~np.isnan(labels)])


def _of_one_kind(key: str, name: str, found: np.ndarray, part: str) -> str:
    """That a label of a part is of one kind or none, and the way out. found: the kinds that there are."""
    said = f"it is {found[0]:g} wherever it is known" if len(found) else "it is not known of any row"
    begin = f"{key}: the {part} has no {name!r} of both kinds"
    if part.startswith("cohort"):
        return f"{begin}: {said}, so that nothing can be learned or calibrated; take another label, or other data"
    if part.startswith("training"):
        return f"{begin} to learn from; lower task.validation, take more task.folds, or take another label"
    return f"{begin} to select by; raise task.validation, take fewer task.folds, or take another label"


def check_precision(precision: str) -> None:
    """Raises ValueError for weights in bfloat16."""
    if precision == "bf16":
        raise ValueError(f"precision={precision}: the clinical encoder has float32 weights; use fp32 or bf16_autocast")


def check_data(values: Mapping[str, Any]) -> None:
    """Raises ValueError that names the key of `data`, without reading a file."""
    for key, meaning in (("format", "the name of a data format"), ("path", "the place of the data set")):
        if not isinstance(values.get(key), str):
            raise ValueError(f"data.{key}={values.get(key)!r} must be {meaning}")
    try:
        check_options(values["format"], [key for key in values if key not in ("format", "path")])
    except ValueError as error:
        raise ValueError(f"data: {error}") from None
