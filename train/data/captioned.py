"""Captioned pictures for diffusion: each row a scene, a style, a time and noise, all determined by its number."""

from dataclasses import dataclass, field, fields

import numpy as np
import torch

from attnzoo.diffusion import training_time
from attnzoo.types import CheckedConfig
from attnzoo.vision.captions import NONE, CaptionWords, caption
from attnzoo.vision.scenes import SceneOptions, SceneWorld, Split
from attnzoo.vision.styles import STYLES
from attnzoo.vision.trained_diffusion import from_pixels
from train.data.base import Batch
from train.data.loader import EpochStream

GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it, less their whole part, are spread evenly from 0 to 1 in any row of numbers."""


@dataclass(frozen=True, kw_only=True)
class CaptionedOptions(CheckedConfig):
    """styles: domains of pictures, of `attnzoo.vision.styles`. images: scenes of an epoch; no scene comes twice.
    validation_images: of a split of their own. hidden_captions: the share of rows without their caption, from which the
    model learns what guidance goes away from."""

    styles: tuple[str, ...] = field(default_factory=lambda: tuple(STYLES))
    images: int = 16384
    validation_images: int = 512
    hidden_captions: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.styles:
            if name not in STYLES:
                raise ValueError(f"styles holds {name!r}; known are {', '.join(STYLES)}")
        if not self.styles:
            raise ValueError("styles=[] must hold a style")
        for name in ("images", "validation_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.hidden_captions < 1:
            raise ValueError(f"hidden_captions={self.hidden_captions} must be at least 0 and below 1")


CAPTIONED_KEYS = tuple(f.name for f in fields(CaptionedOptions))
SCENES = {"image_size": 32, "kinds": 24, "most_objects": 2, "smallest": 12, "largest": 16, "held_out_font": None,
          "held_out_pairs": 0.0, "held_out_positions": False}  # fmt: skip
"""What scenes are by default where they are drawn from noise."""


def words_of_captions(scenes: SceneOptions, options: CaptionedOptions) -> CaptionWords:
    """The words that a model of these pictures learns, and no others."""
    return CaptionWords.of(scenes.names, options.styles, scenes.most_objects)


class CaptionedScenes:
    """Batches (images [N, C, H, W] between -1 and 1, words_NL, lambda_N, noise [N, C, H, W]) of scenes by number."""

    def __init__(self, scenes: SceneOptions, options: CaptionedOptions, length: int, seed: int) -> None:
        self.world, self.options, self.length, self.seed = SceneWorld(scenes), options, length, seed
        self.words = words_of_captions(scenes, options)

    def batch(self, split: Split, rows: np.ndarray) -> Batch:
        """Of the scenes with these numbers."""
        images, words, noise = [], [], []
        size = self.world.options.image_size
        for row in rows.tolist():
            random = np.random.default_rng((self.seed, 2, row))
            scene = self.world.scene(split, self.seed, row)
            style = self.options.styles[random.integers(len(self.options.styles))]
            images.append(STYLES[style](self.world.image(scene)))
            text = caption(scene, style, self.world.names)
            words.append(self.words.encode(text, self.length))
            if random.random() < self.options.hidden_captions:
                words[-1] = [NONE] * self.length
            noise.append(random.standard_normal((3, size, size), dtype=np.float32))
        share_N = torch.from_numpy(rows * GOLDEN % 1.0)
        return (
            from_pixels(np.stack(images)),
            torch.tensor(words),
            training_time(share_N).float(),
            torch.from_numpy(np.stack(noise)),
        )


class CaptionedStream(EpochStream):
    """Training batches: other scenes in every epoch."""

    def __init__(self, pictures: CaptionedScenes, seed: int) -> None:
        self._pictures = pictures
        super().__init__(seed)

    def epoch(self, random: np.random.Generator) -> np.ndarray:
        """Numbers that no other epoch has."""
        images = self._pictures.options.images
        return self._epoch * images + random.permutation(images)

    def batch(self, rows: np.ndarray) -> Batch:
        """As `CaptionedScenes` makes them."""
        return self._pictures.batch("train", rows)

    def too_few(self, wanted: int, rows: int) -> str:
        """Advice for short epochs."""
        return f"one global batch takes {wanted} pictures and data.images={rows}; raise it, or lower train.batch_size"
