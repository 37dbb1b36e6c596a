"""One kind of content part beside text: how a request gives it, and how it becomes embeddings in a prompt.

A part is {"type": kind, kind: value}. `Modality.read` checks the value, cheaply and within limits, before anything is
decoded, and says how many embeddings it will be; `Modality.encode` computes them. Both run in a thread beside the event
loop and beside the engine's steps. To add a kind, write a `Modality`, return it from `serve.loading`, and
name it in `KINDS`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel
from torch import Tensor

KINDS = {
    "image_url": "it was not trained on pictures (task.kind=pictures)",
    "sensor_data": "its language model has no sensor adapter (setting sensors)",
}
"""Every kind that a server may take, and why one without it refuses it."""
MAX_PARTS = 16
"""Most parts of a conversation that are no text."""


@dataclass(frozen=True)
class Content:
    """A part that has been read. rows: embeddings that it becomes. value: what `Modality.encode` takes."""

    rows: int
    value: Any


class Modality(ABC):
    """Reads and encodes parts of one kind, for one model. Threads share it. body: the class of `value`, whose schema is
    in the OpenAPI document. leads: whether parts stand at the beginning of the conversation, before the texts of the
    first message, wherever in it they were given. most: how many a conversation may have."""

    kind: ClassVar[str]
    body: ClassVar[type[BaseModel]]
    leads: ClassVar[bool] = False
    most: int = MAX_PARTS

    @abstractmethod
    def read(self, value: Any, where: str) -> Content:
        """The content of a part. where: the field that holds `value`. Raises ApiError 400 that names the field."""

    @abstractmethod
    def encode(self, content: Content) -> Tensor:
        """Its embeddings [content.rows, model_dim], on any device."""

    @abstractmethod
    def card(self) -> dict[str, Any]:
        """What a part may hold, for the list of models."""
