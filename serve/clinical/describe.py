"""What a server says of its clinical models: their cards in the list of models, and a request that each one answers."""

from typing import Any

from serve.clinical import answer
from serve.clinical.clinic import Served
from serve.clinical.notes import answer as notes
from serve.clinical.notes.reader import NoteReader


def card_of(model: Served, created: int) -> dict[str, Any]:
    """What a model takes and tells."""
    return notes.card(model, created) if isinstance(model, NoteReader) else answer.card(model, created)


def example_of(model: Served) -> dict[str, Any]:
    """A request for one patient: the model's first variable, or a text that is the definition of its first label."""
    patient: dict[str, Any] = {"id": "1"}
    if isinstance(model, NoteReader):
        patient["text"] = model.trained.definitions[0]
    if model.needs is not None:
        variable = next(iter(model.needs.table.values()))
        value = {"variable": variable.name, "hour": 0, "value": variable.plausible[0], "unit": variable.unit}
        patient["measurements"] = [value]
    return {"model": model.name, "patients": [patient]}
