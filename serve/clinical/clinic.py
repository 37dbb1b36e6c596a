"""The clinical models of a server, and the thread that computes for them."""

from collections.abc import Sequence

from serve.clinical.notes.reader import NoteReader
from serve.clinical.predictor import Predictor
from serve.config import ServeConfig
from serve.openai.answer import no_model
from serve.openai.errors import ApiError
from serve.workplace import Terms, Workplace

Served = Predictor | NoteReader
"""A clinical model, of measurements or of texts."""


class Clinic(Workplace):
    """The clinical models of a server, at work. Call the methods from one event loop."""

    def __init__(self, models: Sequence[Served], config: ServeConfig) -> None:
        super().__init__(
            Terms(
                what="prediction",
                most=("max_predictions", config.max_predictions),
                timeout_s=("predict_timeout_s", config.predict_timeout_s),
                fewer="ask for fewer patients at a time",
            )
        )
        self.models, self.config = tuple(models), config

    def find(self, name: str) -> Served:
        """The model of this name. Raises ApiError 404."""
        for model in self.models:
            if model.name == name:
                return model
        raise no_model(name, *(model.name for model in self.models))

    def of_bundles(self, name: str | None) -> Predictor:
        """The model that predicts from a FHIR bundle. name: None for the only one. Raises ApiError."""
        found = [one for one in self.models if isinstance(one, Predictor)] if name is None else [self.find(name)]
        if len(found) > 1:
            known = " and ".join(repr(model.name) for model in found)
            raise ApiError(400, f"model is missing, and this server has {known}; name one of them", param="model")
        if not found or not isinstance(found[0], Predictor):
            text = f"{(found or self.models)[0].name!r} reads texts, and is not asked with FHIR resources; send JSON"
            raise ApiError(400, text, param="model", code="unsupported")
        return found[0]
