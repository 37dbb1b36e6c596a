"""A small model of pictures with random weights, files of pictures, and messages that hold them."""

import base64
import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from attnzoo.checkpoint.frozen import FrozenLM
from attnzoo.models import DecoderLM, PictureConfig, PictureEncoder, VisionConfig
from attnzoo.vision.scenes import SceneOptions
from attnzoo.vision.trained_pictures import TrainedPictures, save_pictures
from attnzoo.vision.turns import TurnFormat
from tests.helpers.serving import small_model, tokenizer

SIZE, CHANNEL = 32, 5
TOWER = {"kind": "mha", "num_heads": 2, "position": "none"}
SCENES = SceneOptions(image_size=SIZE, kinds=6, smallest=8, largest=12, held_out_font=None)


def picture_model(*, sinks: bool = False, max_len: int = 128) -> TrainedPictures:
    """sinks: the begin token has a massive number in one channel, which no layer takes away, and some vectors of
    pictures have little else."""
    decoder = small_model("mha", layers=3, max_len=max_len)
    if sinks:
        decoder.embedding.weight[tokenizer().bos_id, CHANNEL] = 3000.0
    found = in_front_of(FrozenLM(decoder, tokenizer(), "", "float32"), own=True)
    if sinks:
        found.pictures.output.weight[CHANNEL].mul_(20)
    return found


def in_front_of(frozen: FrozenLM, own: bool = False, texts: TurnFormat | None = None) -> TrainedPictures:
    """A tower of random weights whose vectors matter as much as words do."""
    torch.manual_seed(3)
    vision = VisionConfig(image_size=SIZE, patch_size=8, model_dim=16, num_layers=1, attention=TOWER)
    decoder: DecoderLM = frozen.model
    unit = float(decoder.embedding.weight[10:].square().mean().sqrt())
    config = PictureConfig(vision=vision, width=decoder.config.model_dim, unit=unit)
    encoder = PictureEncoder(config).eval().requires_grad_(False)
    encoder.vision.patch.weight.mul_(20)
    return TrainedPictures(encoder, frozen, own, texts or TurnFormat(), asdict(SCENES))


def export(directory: Path, trained: TrainedPictures) -> Path:
    """A run directory with the model."""
    save_pictures(directory / "export", trained)
    return directory


def some_picture(seed: int = 0, width: int = SIZE, height: int = SIZE) -> np.ndarray:
    """uint8 [height, width, 3] of a few plain areas."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST))


def file_of(picture: np.ndarray | Image.Image, kind: str = "png", **options: Any) -> bytes:
    """A file; of webp one without loss unless told otherwise."""
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    if kind == "webp":
        options = {"lossless": True, **options}
    data = io.BytesIO()
    image.save(data, kind.upper(), **options)
    return data.getvalue()


def url_of(data: bytes, kind: str = "png") -> str:
    """A data URL."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def image_part(picture: np.ndarray | str, kind: str = "png") -> dict[str, Any]:
    """A content part, of a picture or a URL."""
    url = picture if isinstance(picture, str) else url_of(file_of(picture, kind), kind)
    return {"type": "image_url", "image_url": {"url": url}}


def message(*parts: str | dict[str, Any]) -> dict[str, Any]:
    """A user's message of texts and parts."""
    found = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": found}
