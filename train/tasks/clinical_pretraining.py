"""Pretraining of a clinical model on a fold's training stays, without their labels: it tells hidden cells from the
others.

`checkpoint.init_from` of a clinical run of the same fold begins with the encoder that this task exports.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from attnzoo.clinical.trained import TrainedModel
from attnzoo.models import EhrPretraining
from train.config import Config
from train.data import Batch
from train.tasks.base import TASKS
from train.tasks.clinical import ClinicalTask


@TASKS.register("clinical-pretraining")
class ClinicalPretraining(ClinicalTask):
    """An `EhrPretraining` on the batches of `ClinicalTask`, of which labels are not used."""

    UNUSED = (*ClinicalTask.UNUSED, "checkpoint.init_from")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.METRICS = ("loss",)  # type: ignore[misc]

    def model(self) -> EhrPretraining:
        """A new encoder with heads for cells."""
        return EhrPretraining(self.encoder())

    def count(self, batch: Batch) -> int:
        """Stays."""
        return len(batch[0])

    def loss(self, model: nn.Module, batch: Batch, count: Tensor) -> Tensor:
        """The mean over hidden cells of the batch, weighted by its stays."""
        cells_NTVC, statics_NS, hours_N, _ = batch
        return cast(EhrPretraining, model).loss(cells_NTVC, statics_NS, hours_N) * (len(hours_N) / count)

    def measure(self, model: nn.Module, batch: Batch) -> Tensor:
        """[1]: the loss times the number of stays, with the same cells hidden in every evaluation."""
        generator = torch.Generator(batch[0].device).manual_seed(self.config.seed)
        cells_NTVC, statics_NS, hours_N, _ = batch
        return cast(EhrPretraining, model).loss(cells_NTVC, statics_NS, hours_N, generator)[None] * len(hours_N)

    def metrics(self, batch: Batch, measured: Tensor) -> dict[str, float]:
        """loss: the mean over stays."""
        return {"loss": float(measured.double().sum()) / self.count(batch)}

    def score(self, metrics: dict[str, float]) -> float:
        """The lower the loss, the better."""
        return -metrics["loss"]

    def judged(self, whole: TrainedModel, metadata: dict[str, Any]) -> TrainedModel:
        """Without a calibration and evidence: the head tells nothing yet."""
        return replace(whole, metadata=metadata)

    def save(self, directory: Path, model: nn.Module, metadata: dict[str, Any]) -> None:
        """The encoder alone, in the form of `ClinicalTask`; its head has not learned anything."""
        super().save(directory, cast(EhrPretraining, model).encoder, metadata)
