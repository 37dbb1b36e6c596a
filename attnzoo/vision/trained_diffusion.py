"""A trained diffusion model: on disk as config.json and model.safetensors, and as what draws captions.

Loading cannot run code.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnzoo.checkpoint import model_files
from attnzoo.diffusion import grid, guided, solve, told
from attnzoo.models import DiffusionConfig, DiffusionUNet
from attnzoo.vision.captions import CaptionWords

FORMAT = "attnzoo-diffusion-1"
KEYS = ("format", "model", "words", "data", "metadata")
"""Keys of config.json."""


def to_pixels(x_NCHW: Tensor) -> np.ndarray:
    """uint8 [N, H, W, C] of images between -1 and 1."""
    scaled = (x_NCHW.detach().float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def from_pixels(images_NHWC: np.ndarray) -> Tensor:
    """Images between -1 and 1, float32 [N, C, H, W], of uint8 [N, H, W, C]."""
    return torch.from_numpy(images_NHWC.astype(np.float32)).permute(0, 3, 1, 2).contiguous() / 127.5 - 1


@dataclass(frozen=True)
class TrainedDiffusion:
    """A model in evaluation mode and its words. data: what its pictures were; metadata: of the run."""

    model: DiffusionUNet
    words: CaptionWords
    data: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def encode(self, captions: Sequence[str]) -> Tensor:
        """words_NL of the captions. Raises ValueError for words that the model does not know."""
        return torch.tensor([self.words.encode(text, self.model.config.words) for text in captions])

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """The noise that a picture with this seed begins with, [N, C, H, W]; each seed has its own, in any batch."""
        config = self.model.config
        shape = (config.channels, config.image_size, config.image_size)
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    @torch.no_grad()
    def draw(
        self,
        captions: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int = 20,
        guidance: float = 3.0,
        tell: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Pictures between -1 and 1, [N, C, H, W]: the same for the same caption, seed, steps and guidance. tell: gets
        what the model sees in the noise at each step, of the same shape.

        Raises ValueError for unknown words, and for another number of seeds than of captions.
        """
        if len(captions) != len(seeds):
            raise ValueError(f"{len(captions)} captions have {len(seeds)} seeds; give one for each")
        weight = self.model.first.weight
        words_NL = self.encode(captions).to(weight.device)
        denoise = guided(self.model, words_NL, torch.full_like(words_NL, -1), guidance)
        return solve(self.noise(seeds).to(weight), told(denoise, tell), grid(steps)).clamp(-1, 1)


def save_diffusion(directory: Path, trained: TrainedDiffusion) -> Path:
    """Writes the directory, and replaces an earlier one of its format. Raises ValueError for anything else in it."""
    content = {
        "format": FORMAT,
        "model": trained.model.config.to_dict(),
        "words": list(trained.words.words),
        "data": dict(trained.data),
        "metadata": dict(trained.metadata),
    }
    return model_files.write(directory, content, trained.model, {})


def holds_diffusion(directory: Path | str) -> bool:
    """Whether a directory holds what `save_diffusion` wrote, damaged or not; errors are `load_diffusion`'s to tell."""
    return model_files.holds(directory, FORMAT)


def check_target(directory: Path) -> None:
    """Raises ValueError unless `save_diffusion` may write to the directory."""
    model_files.check_target(directory, FORMAT, ())


def load_diffusion(directory: Path | str) -> TrainedDiffusion:
    """Of an export, or of a run directory that has one. Raises ValueError that names the file."""
    path = model_files.find(directory)
    (content,) = model_files.read(path, FORMAT, KEYS, ())
    with model_files.damage(path):
        model = DiffusionUNet(DiffusionConfig.from_dict(content["model"]))
        model_files.load_weights(path, model)
        return TrainedDiffusion(model, CaptionWords(content["words"]), content["data"], content["metadata"])
