"""Sensor adapters in front of a frozen language model (PH-LLM): several yes/no questions about each row of a cohort.

The language model is no part of the trained model: it is neither in checkpoints nor in the export, which name it.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.checkpoint import existing_checkpoint, load_tokenizer, open_checkpoint
from attnzoo.checkpoint.frozen import FrozenLM
from attnzoo.clinical import trained_sensors
from attnzoo.clinical.metrics import auprc, auroc
from attnzoo.clinical.sensors import QUESTIONS, SensorQuestions, SensorStatistics
from attnzoo.clinical.trained_sensors import TrainedSensors
from attnzoo.errors import suggest
from attnzoo.models import PromptedLM, SensorAdapter, SensorConfig
from attnzoo.models.sensor_lm import answer_scores
from attnzoo.types import CheckedConfig, build_config, parse_dtype
from train.config import Config
from train.data import Batch
from train.tasks.base import TASKS
from train.tasks.cohort import CohortOptions, CohortTask, StayStream, check_data, check_precision

FROM_DATA = ("numbers", "width")
"""Keys of the adapter that the sensors and the language model determine."""


@dataclass(frozen=True, kw_only=True)
class SensorOptions(CohortOptions):
    """questions: by label, the question that yes answers where the label is 1. template: the prompt, with {question},
    and {sensors} where the virtual tokens stand; what stands before them is read once for all rows. answers: no and
    yes, as they go on after the template. share: of the training rows that are used, for measuring what fewer give."""

    questions: dict = field(default_factory=lambda: dict(QUESTIONS))
    template: str = SensorQuestions.template
    answers: tuple[str, str] = SensorQuestions.answers
    share: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ValueError(f"task.share={self.share} must be above 0 and at most 1")
        self.asked()

    def asked(self) -> SensorQuestions:
        """The questions. Raises ValueError."""
        return SensorQuestions(questions=self.questions, template=self.template, answers=self.answers)


@dataclass(frozen=True, kw_only=True)
class LanguageModelOptions(CheckedConfig):
    """language_model: the frozen one, as `attnzoo.load` finds it. dtype: of its weights."""

    language_model: str = "smollm2"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_dtype(self.dtype)


@TASKS.register("sensor-lm")
class SensorTask(CohortTask):
    """A `SensorAdapter` on a cohort of daily sensors. Batches are (numbers_NF, labels_NQ), float32; a label of NaN does
    not count."""

    METRICS = ("loss", "auroc", "auprc")
    UNUSED: ClassVar[tuple[str, ...]] = (*CohortTask.UNUSED, "checkpoint.init_from")
    NEXT = "; attnzoo.clinical.trained_sensors.load_sensors('{run}').predict(cohort) predicts"
    options: SensorOptions

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.options = build_config(SensorOptions, config.task, "task")
        self.questions = self.options.asked()
        self._language_model = _language_model_options(config.model)

    @classmethod
    def sections(cls, config: Config) -> Mapping[str, Callable[[], object]]:
        """The classes that define the sections' keys."""
        return {
            "task": lambda: build_config(SensorOptions, config.task, "task"),
            "precision": lambda: check_precision(config.precision),
            "model": lambda: _check_model(config.model),
            "data": lambda: check_data(config.data),
        }

    # --- before anything is prepared ----------------------------------------------------------------------------

    def check(self) -> None:
        """Reads the cohort, splits it, and looks at the language model's tokenizer and length."""
        self.check_kinds("task.questions", dict(zip(self.questions.labels, self.labels.T, strict=True)))
        path = existing_checkpoint(self._language_model.language_model)
        context = open_checkpoint(path).config.max_positions
        for prompt in self.questions.prompts(load_tokenizer(path)):
            needed = len(prompt.before) + self._adapter_config().tokens + max(map(len, prompt.tails())) + 1
            if needed > context:
                raise ValueError(
                    f"task.template: a prompt takes {needed} tokens, and the context of "
                    f"model.language_model={self._language_model.language_model} is {context}; shorten it"
                )

    @property
    def strata(self) -> str | tuple[str, ...] | None:
        """None: people are too few to balance several labels."""
        return None

    @cached_property
    def labels(self) -> np.ndarray:
        """[N, Q]."""
        try:
            return self.questions.outcomes(self.cohort)
        except ValueError as error:
            raise ValueError(f"task.questions: {error}") from None

    # --- data ---------------------------------------------------------------------------------------------------

    @cached_property
    def learned(self) -> np.ndarray:
        """The training rows that are used: every 1/share-th of them."""
        rows = self.fold.train
        count = max(1, round(len(rows) * self.options.share))
        return rows[np.arange(count) * len(rows) // count]

    @cached_property
    def statistics(self) -> SensorStatistics:
        """Of the training rows that are used, alone."""
        return SensorStatistics.fit(self.cohort, self.learned)

    @cached_property
    def numbers(self) -> Tensor:
        """Of all rows of the cohort, standardised."""
        return torch.from_numpy(self.statistics.standardised(self.cohort))

    @cached_property
    def language_model(self) -> FrozenLM:
        """Read once on every rank."""
        return FrozenLM.load(self._language_model.language_model, self._language_model.dtype)

    @cached_property
    def reader(self) -> PromptedLM:
        """The language model with the states of its prompts."""
        return PromptedLM(self.language_model.model, self.questions.prompts(self.language_model.tokenizer))

    def prepare(self, is_main: bool) -> None:
        """Everything is in memory; each rank reads the files."""
        super().prepare(is_main)
        self.train = StayStream(self.learned, self.config.seed, self.batch, self.ROW)

    def batch(self, rows: np.ndarray) -> Batch:
        """As the class says."""
        return self.numbers[torch.from_numpy(rows)], torch.from_numpy(self.labels[rows])

    def fitted(self) -> object:
        """The statistics, and the language model."""
        return [self.statistics.to_dict(), self.language_model.digest]

    def content(self) -> dict[str, Any]:
        """As of every cohort."""
        model = {**self._adapter_config().to_dict(), **asdict(self._language_model)}
        return self._content(asdict(self.options), model)

    # --- model and loss -----------------------------------------------------------------------------------------

    def _adapter_config(self) -> SensorConfig:
        width = open_checkpoint(existing_checkpoint(self._language_model.language_model)).config.model_dim
        values = {key: value for key, value in self.config.model.items() if key not in asdict(self._language_model)}
        return SensorConfig.from_dict({**values, "numbers": len(self.statistics.names), "width": width})

    def model(self) -> SensorAdapter:
        """New weights."""
        return SensorAdapter(self._adapter_config())

    def count(self, batch: Batch) -> int:
        """Labels that are known."""
        return int((~torch.isnan(batch[1])).sum())

    def loss(self, model: nn.Module, batch: Batch, count: Tensor) -> Tensor:
        """Cross entropy of the two answers."""
        return self._loss_sum(self.measure(model, batch), batch[1]) / count

    def _loss_sum(self, scores_NQ: Tensor, labels_NQ: Tensor) -> Tensor:
        known = ~torch.isnan(labels_NQ)
        return F.binary_cross_entropy_with_logits(scores_NQ[known].float(), labels_NQ[known].float(), reduction="sum")

    # --- evaluation ---------------------------------------------------------------------------------------------

    def measure(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits of yes [N, Q]."""
        numbers_NF = batch[0].to(next(model.parameters()).dtype)
        return answer_scores(self.reader.to(numbers_NF.device).log_likelihoods(model(numbers_NF)))

    def metrics(self, batch: Batch, measured: Tensor) -> dict[str, float]:
        """loss: mean over all answers; auroc, auprc: mean over questions."""
        labels_NQ = batch[1]
        if not bool(torch.isfinite(measured).all()):
            return dict.fromkeys(self.METRICS, float("nan"))
        known_NQ = ~torch.isnan(labels_NQ)
        pairs = [(labels_NQ[k, q].numpy(), measured[k, q].numpy()) for q, k in enumerate(known_NQ.T)]
        return {
            "loss": float(self._loss_sum(measured, labels_NQ)) / self.count(batch),
            "auroc": float(np.mean([auroc(*pair) for pair in pairs])),
            "auprc": float(np.mean([auprc(*pair) for pair in pairs])),
        }

    def score(self, metrics: dict[str, float]) -> float:
        """The mean AUROC."""
        return metrics["auroc"]

    # --- results ------------------------------------------------------------------------------------------------

    def check_target(self, directory: Path) -> None:
        """Only an earlier adapter is replaced."""
        trained_sensors.check_target(directory)

    def save(self, directory: Path, model: nn.Module, metadata: dict[str, Any]) -> None:
        """As `attnzoo.clinical.trained_sensors.load_sensors` reads it."""
        data, split = self._data_and_split()
        adapter, share = cast(SensorAdapter, model), {"share": self.options.share}
        whole = TrainedSensors(
            adapter, self.language_model, self.statistics, self.questions, data, {**split, **share}, metadata
        )
        trained_sensors.save_sensors(directory, whole)

    def summary(self) -> dict[str, Any]:
        """As of every cohort, with the days that are used."""
        return {**super().summary(), "training_stays": len(self.learned)}


def _language_model_options(values: Mapping[str, Any]) -> LanguageModelOptions:
    known = [f.name for f in fields(LanguageModelOptions)]
    return build_config(LanguageModelOptions, {key: values[key] for key in known if key in values}, "model")


def _check_model(values: Mapping[str, Any]) -> None:
    """Raises ValueError that names the key of `model`."""
    for key in FROM_DATA:
        if key in values:
            raise ValueError(
                f"model.{key}={values[key]!r}: the sensors and the language model determine it; leave it out"
            )
    own = asdict(_language_model_options(values))
    known = [f.name for f in fields(SensorConfig) if f.name not in FROM_DATA]
    for key in values:
        if key not in known and key not in own:
            raise ValueError(f"unknown key model.{key}{suggest(str(key), [*own, *known])}")
    SensorConfig.from_dict({"numbers": 1, "width": 1, **{key: value for key, value in values.items() if key in known}})
