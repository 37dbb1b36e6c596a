"""A small diffusion model with random weights, what it is asked, and pictures as data URLs."""

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from starlette.testclient import TestClient

from attnzoo.models import DiffusionConfig, DiffusionUNet
from attnzoo.vision import CaptionWords
from attnzoo.vision.trained_diffusion import TrainedDiffusion, save_diffusion, to_pixels
from serve.config import ServeConfig
from serve.drawing.loading import load_studio
from serve.openai.routes import build_app

MODEL, SIDE = "tiny", 16
PROMPT = "a sketch of a car and a dog on a blue plain background"
GENERATE = {"model": MODEL, "prompt": "a photo of an apple on a red plain background", "steps": 2}
PATHS = {"draw": "/v1/images/generations", "compose": "/v1/images/compose"}


def small_diffusion(**sizes: Any) -> TrainedDiffusion:
    """Its pictures differ by prompt and seed."""
    torch.manual_seed(0)
    words = CaptionWords()
    own = {"vocab_size": len(words), "image_size": SIDE, "widths": (16,), "patch": 4, "num_heads": 2, "text_dim": 16}
    model = DiffusionUNet(DiffusionConfig(**{**own, "text_layers": 1, **sizes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return TrainedDiffusion(model, words)


def export(directory: Path, trained: TrainedDiffusion) -> Path:
    """A run directory with the model's export, whose name is `MODEL`."""
    save_diffusion(directory / MODEL / "export", trained)
    return directory / MODEL


def app_of(checkpoint: Path, **settings: Any) -> Any:
    """The application without Ray."""
    config = ServeConfig(checkpoint=str(checkpoint), **settings)
    return build_app(None, config, studio=load_studio(config))


@contextmanager
def drawing_client(checkpoint: Path, **settings: Any) -> Iterator[TestClient]:
    """A client of the application without a socket."""
    with TestClient(app_of(checkpoint, **settings), base_url="http://localhost") as client:
        yield client


def thing(height: int = 6, width: int = 6, seed: int = 1) -> np.ndarray:
    """An object, uint8 [height, width, 4], whose first row is transparent."""
    found = np.random.default_rng(seed).integers(0, 256, (height, width, 4), np.uint8)
    found[..., 3] = 255
    found[0, :, 3] = 0
    return found


def backdrop(side: int = SIDE, seed: int = 0) -> np.ndarray:
    """uint8 [side, side, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def data_url(pixels: np.ndarray) -> str:
    """A PNG of uint8 [H, W, 3 or 4]."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def composition(**fields: Any) -> dict[str, Any]:
    """A request to compose."""
    return {
        "model": MODEL,
        "background": data_url(backdrop()),
        "object": data_url(thing()),
        "region": {"left": 3, "top": 5},
        "prompt": PROMPT,
        "object_words": "a dog",
        "background_prompt": "a sketch of a car on a blue plain background",
        "steps": 2,
        **fields,
    }


def pixels_of(b64_json: str) -> np.ndarray:
    """uint8 [H, W, 3] of a picture in an answer, which must be a PNG."""
    image = Image.open(io.BytesIO(base64.b64decode(b64_json)), formats=["PNG"])
    assert image.mode == "RGB"
    return np.array(image)


def drawn(x_1CHW: torch.Tensor) -> np.ndarray:
    """The same of what the library makes."""
    return to_pixels(x_1CHW)[0]


def ask(client: Any, kind: str, body: Any, status: int = 200) -> dict[str, Any]:
    """The reply, or the error of a refusal with that status."""
    answer = client.post(PATHS[kind], json=body)
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json() if status == 200 else answer.json()["error"]
    return found
