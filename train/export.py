"""Exports a trained model for inference."""

from pathlib import Path
from typing import Any

from train.best_weights import BestWeights
from train.engine import TrainingEngine
from train.failures import TrainingError
from train.finite import first_non_finite
from train.ranks import agree


def export(engine: TrainingEngine, best: BestWeights, directory: Path, metadata: dict[str, Any]) -> None:
    """Writes the task's export with whole weights (float32, gathered from all ranks, adapters merged), or with
    the mean of the best ones, if there are any.

    Called by every rank. An existing export is replaced only after the new one has been written. Raises AgreedError if
    a weight is not finite.
    """
    present = None if best.scores else engine.full_state()

    def write() -> None:
        if engine.rank != 0:
            return
        model = engine.task.rebuilt(engine.model, best.mean() if present is None else present)
        # Only parameters are checked: a buffer may hold -inf, as a mask does.
        name = first_non_finite(model.named_parameters())
        if name is not None:
            raise TrainingError(f"{name} is not finite: {directory} is not written")
        engine.task.save(directory, model, metadata)

    agree(write)
