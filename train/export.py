"""Exports a trained model for inference."""

from pathlib import Path
from typing import Any

from train.engine import TrainingEngine
from train.failures import TrainingError
from train.finite import first_non_finite
from train.ranks import agree
from train.selection import Selection


def export(engine: TrainingEngine, selection: Selection, directory: Path, metadata: dict[str, Any]) -> None:
    """Writes the task's export with whole weights (float32, gathered from all ranks, adapters merged): the mean of the
    selection's, if there are any.

    Called by every rank. An existing export is replaced only after the new one has been written. Raises AgreedError if
    a weight is not finite.
    """
    present = None if selection.scores else engine.full_state()

    def write() -> None:
        if engine.rank != 0:
            return
        model = engine.task.rebuilt(engine.model, selection.mean() if present is None else present)
        # Only parameters are checked: a buffer may hold -inf, as a mask does.
        name = first_non_finite(model.named_parameters())
        if name is not None:
            raise TrainingError(f"{name} is not finite: {directory} is not written")
        engine.task.save(directory, model, metadata)

    agree(write)
