"""A trained sensor adapter on disk: config.json, model.safetensors and statistics.json, written atomically.

The frozen language model is not part of it: config.json names its checkpoint and a digest of its weights, and a
language model with other weights is refused. Loading cannot run code.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnzoo.checkpoint import model_files
from attnzoo.checkpoint.frozen import FrozenLM
from attnzoo.clinical import checks
from attnzoo.clinical.cohort import Cohort, chosen_rows
from attnzoo.clinical.sensors import SensorQuestions, SensorStatistics
from attnzoo.clinical.variables import PMDATA, Table
from attnzoo.models import PromptedLM, SensorAdapter, SensorConfig
from attnzoo.models.sensor_lm import answer_scores, as_embeddings, embedding_unit
from attnzoo.types import build_config

FORMAT = "attnzoo-sensors-1"
STATISTICS = "statistics.json"
KEYS = ("format", "model", "language_model", "questions", "data", "split", "metadata")
"""Keys of config.json."""


@dataclass(frozen=True)
class TrainedSensors:
    """A sensor adapter with what its predictions depend on. data, split, metadata: as of
    `attnzoo.clinical.trained.TrainedModel`."""

    adapter: SensorAdapter
    language_model: FrozenLM
    statistics: SensorStatistics
    questions: SensorQuestions
    data: dict[str, Any] = field(default_factory=dict)
    split: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def reader(self) -> PromptedLM:
        """The language model with the states of its prompts."""
        return PromptedLM(self.language_model.model, self.questions.prompts(self.language_model.tokenizer))

    @torch.no_grad()
    def scores(self, numbers_NF: np.ndarray | Tensor, batch_size: int = 16) -> np.ndarray:
        """Logits of yes [N, Q], float32, of standardised numbers."""
        given_NF = torch.as_tensor(numbers_NF, dtype=torch.float32)
        return self.scores_of(self.adapter(given_NF), batch_size)

    @torch.no_grad()
    def scores_of(self, virtual_NMD: Tensor, batch_size: int = 16) -> np.ndarray:
        """Logits of yes [N, Q], float32, of virtual tokens, whatever they were made of."""
        parts = [answer_scores(self.reader.log_likelihoods(part)) for part in virtual_NMD.split(batch_size)]
        return torch.cat(parts).numpy()

    @cached_property
    def unit(self) -> float:
        """Of the virtual tokens."""
        return embedding_unit(self.language_model.model)

    @torch.no_grad()
    def embeddings(self, cohort: Cohort, rows: np.ndarray | None = None) -> Tensor:
        """Embeddings [N, M, model_dim] of rows, for prompts of the language model (`attnzoo.models.Embedded`). Raises
        ValueError for other sensors."""
        numbers_NF = torch.from_numpy(self.statistics.standardised(cohort, chosen_rows(cohort, rows)))
        return as_embeddings(self.adapter(numbers_NF), self.language_model.model, self.unit)

    @property
    def table(self) -> Table:
        """The daily sensors in the order of the model. Raises ValueError for one that is not among them."""
        names = [name.removesuffix(" mean") for name in self.statistics.names[::2]]
        unknown = next((name for name in names if name not in PMDATA), None)
        if unknown is not None:
            raise ValueError(f"the sensor {unknown!r} has no row among the daily ones in attnzoo/clinical/variables.py")
        return {name: PMDATA[name] for name in names}

    def predict(self, cohort: Cohort, rows: np.ndarray | None = None, batch_size: int = 16) -> np.ndarray:
        """Probabilities of yes [N, Q], in the order of `questions.labels`. Raises ValueError for other sensors."""
        checks.count(batch_size, "batch_size", 1)
        scores_NQ = self.scores(self.statistics.standardised(cohort, chosen_rows(cohort, rows)), batch_size)
        return 1 / (1 + np.exp(-scores_NQ.astype(np.float64)))


def holds_sensors(directory: Path | str) -> bool:
    """Whether a directory, or a run's export, holds what `save_sensors` wrote, damaged or not."""
    return model_files.holds(directory, FORMAT)


def named_language_model(directory: Path | str) -> tuple[str, str]:
    """(checkpoint, dtype) of the language model that an adapter was trained with. Raises ValueError as `load_sensors`,
    without reading any weights."""
    path = model_files.find(directory)
    content, _ = model_files.read(path, FORMAT, KEYS, (STATISTICS,))
    with model_files.damage(path):
        return str(content["language_model"]["checkpoint"]), str(content["language_model"]["dtype"])


def check_target(directory: Path) -> None:
    """Raises ValueError, naming what would be lost, unless `save_sensors` may write to `directory`."""
    model_files.check_target(directory, FORMAT, (STATISTICS,))


def save_sensors(directory: Path, trained: TrainedSensors) -> Path:
    """Writes the adapter, replacing an earlier one; returns the directory. Raises ValueError as `check_target`."""
    content = {
        "format": FORMAT,
        "model": trained.adapter.config.to_dict(),
        "language_model": trained.language_model.to_dict(),
        "questions": vars(trained.questions),
        "data": trained.data,
        "split": trained.split,
        "metadata": trained.metadata,
    }
    return model_files.write(directory, content, trained.adapter, {STATISTICS: trained.statistics.to_dict()})


def load_sensors(directory: Path | str, language_model: FrozenLM | None = None) -> TrainedSensors:
    """The adapter in a directory that `save_sensors` wrote, or in a run directory with such an export.

    language_model: None loads the one that the export names. Raises ValueError that names the file if one is missing,
    damaged or of another format, and for a language model with other weights than the adapter was trained with.
    """
    path = model_files.find(directory)
    content, statistics = model_files.read(path, FORMAT, KEYS, (STATISTICS,))
    with model_files.damage(path):
        adapter = SensorAdapter(SensorConfig.from_dict(content["model"]))
        model_files.load_weights(path, adapter)
        fitted = SensorStatistics.from_dict(statistics)
        questions = build_config(SensorQuestions, content["questions"], "questions")
        named = {key: str(content["language_model"][key]) for key in ("checkpoint", "dtype", "digest")}
        parts = {name: dict(content.get(name, {})) for name in ("data", "split", "metadata")}
    frozen = language_model or FrozenLM.load(named["checkpoint"], named["dtype"])
    if frozen.digest != named["digest"]:
        raise ValueError(
            f"{path} was trained with another language model than {frozen.checkpoint} in {frozen.dtype} (their digests "
            f"differ); give the weights of {named['checkpoint']} in {named['dtype']} that it was trained with"
        )
    return TrainedSensors(adapter, frozen, fitted, questions, **parts)
