"""Pictures in a message become vectors of a vision tower and its projector (`task.kind: pictures`).

The model has learned conversations that begin with a picture, so pictures stand in the first message, before its text.
"""

from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from attnzoo.vision.trained_pictures import TrainedPictures
from serve.config import EngineConfig
from serve.modalities.base import Content, Modality
from serve.modalities.image_files import FORMATS, FileLimits, pixels_of
from serve.openai.errors import ApiError
from serve.openai.invalid import explain_invalid
from serve.openai.protocol import Strict


class ImageUrl(Strict):
    """A picture. url: a data URL, data:image/png;base64,..., of a png, jpeg or webp file. detail: there is one size."""

    url: str
    detail: Literal["auto"] | None = None


class ImageModality(Modality):
    """Parts of the kind image_url, for a trained model of pictures. Raises ValueError for one of other channels than
    red, green and blue, and where nothing is installed that reads files."""

    kind, body, leads = "image_url", ImageUrl, True

    def __init__(self, trained: TrainedPictures, config: EngineConfig) -> None:
        if find_spec("PIL") is None:
            raise ValueError("files of pictures are read by the package pillow: pip install 'attnzoo[vision]'")
        vision = trained.pictures.config.vision
        if vision.channels != 3:
            raise ValueError(f"pictures of {vision.channels} channels cannot be served: files have red, green and blue")
        self.trained, self.size, self.most = trained, vision.image_size, config.max_images
        self.rows = trained.pictures.config.tokens
        self.limits = FileLimits(config.max_image_bytes, config.max_image_pixels)

    def read(self, value: Any, where: str) -> Content:
        """The content is uint8 [size, size, 3]."""
        try:
            given = ImageUrl.model_validate(value)
        except ValidationError as error:
            raise explain_invalid(error, where, lambda _: list(ImageUrl.model_fields)) from None
        try:
            return Content(self.rows, pixels_of(given.url, self.limits, self.size))
        except ValueError as error:
            raise ApiError(400, f"{where}.url: {error}", param=f"{where}.url") from None

    def encode(self, content: Content) -> Tensor:
        """The vectors [M, model_dim] of the picture."""
        pixels: np.ndarray = content.value
        vectors_MD: Tensor = self.trained.pictures(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])[0]
        return vectors_MD

    def card(self) -> dict[str, Any]:
        """What files may be, and the size that the model sees."""
        return {
            "formats": list(FORMATS),
            "size": self.size,
            "embeddings": self.rows,
            "max_images": self.most,
            "max_bytes": self.limits.most_bytes,
            "max_pixels": self.limits.most_pixels,
        }
