"""Pictures in a message become vectors of a vision tower and its projector (`task.kind: pictures`).

The model has learned conversations that begin with a picture, so pictures stand in the first message, before its text.
"""

from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from attnzoo.vision.pillow import import_pillow
from attnzoo.vision.trained_pictures import TrainedPictures
from serve.config import EngineConfig
from serve.images import ImageLimits, decoded
from serve.modalities.base import Content, Modality
from serve.openai.errors import ApiError
from serve.openai.invalid import explain_invalid
from serve.openai.protocol import Strict

MAX_SIDE = 1 << 14
GREY = (127, 127, 127)


def fitted(picture_CHW: Tensor, size: int) -> Tensor:
    """The picture, uint8, scaled to fit into a square of that size, on grey where it is no square; one that has the
    size as it is."""
    pillow = import_pillow()
    image = pillow.Image.fromarray(picture_CHW.permute(1, 2, 0).contiguous().numpy())
    square = pillow.ImageOps.pad(image, (size, size), color=GREY)
    return torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)


class ImageUrl(Strict):
    """A picture. url: a data URL, data:image/png;base64,..., of a png, jpeg or webp file. detail: there is one size."""

    url: str
    detail: Literal["auto"] | None = None


class ImageModality(Modality):
    """Parts of the kind image_url, for a trained model of pictures. Raises ValueError for one of other channels than
    red, green and blue, and where nothing is installed that reads files."""

    kind, body, leads = "image_url", ImageUrl, True

    def __init__(self, trained: TrainedPictures, config: EngineConfig) -> None:
        import_pillow()
        vision = trained.pictures.config.vision
        if vision.channels != 3:
            raise ValueError(f"pictures of {vision.channels} channels cannot be served: files have red, green and blue")
        self.trained, self.size, self.most = trained, vision.image_size, config.max_images
        self.rows = trained.pictures.config.tokens
        self.limits = ImageLimits(config.max_image_bytes, MAX_SIDE, config.max_image_pixels)

    def read(self, value: Any, where: str) -> Content:
        """The content is uint8 [3, size, size]."""
        try:
            given = ImageUrl.model_validate(value)
        except ValidationError as error:
            raise explain_invalid(error, where, lambda _: list(ImageUrl.model_fields)) from None
        picture_CHW, where = decoded(given.url, f"{where}.url", self.limits), f"{where}.url"
        height, width = picture_CHW.shape[1:]
        if min(width, height) * self.size < max(width, height):
            what = (
                f"{where} has {width} x {height} pixels, and its shorter side would have less than one of the "
                f"{self.size} x {self.size} that the model sees; cut it"
            )
            raise ApiError(400, what, param=where, code="invalid_image")
        return Content(self.rows, fitted(picture_CHW, self.size))

    def encode(self, content: Content) -> Tensor:
        """The vectors [M, model_dim] of the picture."""
        vectors_MD: Tensor = self.trained.pictures(content.value[None])[0]
        return vectors_MD

    def card(self) -> dict[str, Any]:
        """What files may be, and the size that the model sees."""
        return {
            "formats": ["png", "jpeg", "webp"],
            "size": self.size,
            "embeddings": self.rows,
            "max_images": self.most,
            "max_bytes": self.limits.max_bytes,
            "max_pixels": self.limits.max_pixels,
        }
