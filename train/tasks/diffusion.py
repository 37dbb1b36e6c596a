"""Text-conditional diffusion on captioned pictures: `attnzoo.models.DiffusionUNet` learns to see the image in noise."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
from torch import Tensor, nn

from attnzoo.diffusion import noised
from attnzoo.errors import suggest
from attnzoo.models import DiffusionConfig, DiffusionUNet
from attnzoo.types import CheckedConfig, build_config
from attnzoo.vision import trained_diffusion
from attnzoo.vision.captions import longest_caption
from attnzoo.vision.scenes import SceneOptions
from attnzoo.vision.trained_diffusion import TrainedDiffusion
from train.config import Config
from train.data import Batch
from train.data.captioned import (
    CAPTIONED_KEYS,
    SCENES,
    CaptionedOptions,
    CaptionedScenes,
    CaptionedStream,
    words_of_captions,
)
from train.tasks.base import TASKS, Task, TaskOptions

FROM_DATA = ("vocab_size", "image_size", "channels")
"""Keys of the model that the data determine."""


@dataclass(frozen=True, kw_only=True)
class DiffusionOptions(TaskOptions, CheckedConfig):
    """There are none besides `kind`."""


@TASKS.register("diffusion")
class DiffusionTask(Task):
    """A `DiffusionUNet` on scenes. Batches are those of `train.data.captioned.CaptionedScenes`. The loss of a row is
    the mean squared error of x0 over its pixels, in units of what the linear estimate leaves (Karras et al. 2022, arXiv
    2206.00364, table 1): 1 for a model that has learned nothing."""

    ROW = UNIT = "image"
    METRICS = ("loss",)
    UNUSED: ClassVar[tuple[str, ...]] = (
        "tokenizer",
        "lora",
        "sample",
        "checkpoint.init_from",
        "checkpoint.adopt_model",
        "train.activation_checkpointing",
        "eval.below_ngrams",
    )
    NEXT = "; attnzoo.vision.load_diffusion('{run}').draw([caption], [seed]) draws"
    preparing = "the fonts of emoji"

    @classmethod
    def sections(cls, config: Config) -> Mapping[str, Callable[[], object]]:
        """The classes that define the sections' keys."""
        return {
            "task": lambda: build_config(DiffusionOptions, config.task, "task"),
            "model": lambda: _check_model(config.model),
            "data": lambda: _options(config.data),
        }

    def check(self) -> None:
        """Looks for the fonts, and whether the model reads whole captions."""
        longest = longest_caption(self.pictures.world.options.most_objects)
        if self.pictures.length < longest:
            raise ValueError(
                f"model.words={self.pictures.length}: captions have up to {longest} words with "
                f"data.most_objects={self.pictures.world.options.most_objects}; raise it"
            )

    # --- data ---------------------------------------------------------------------------------------------------

    @cached_property
    def pictures(self) -> CaptionedScenes:
        """The scenes. Raises ValueError where a font is not installed."""
        scenes, options = _options(self.config.data)
        return CaptionedScenes(scenes, options, self._model_config().words, self.config.seed)

    def prepare(self, is_main: bool) -> None:
        """Nothing is stored: scenes are drawn as they are needed."""
        self.train = CaptionedStream(self.pictures, self.config.seed)

    def content(self) -> dict[str, Any]:
        """All options, and a digest of what emoji look like."""
        scenes, options = _options(self.config.data)
        return {
            **{f"model.{key}": value for key, value in self._model_config().to_dict().items()},
            **{f"data.{key}": value for key, value in (asdict(scenes) | asdict(options)).items()},
            "data (content)": self.pictures.world.digest,
        }

    def validation(self, most: int | None = None) -> Batch:
        """Scenes of a split of their own, always the same."""
        number = self.pictures.options.validation_images
        return self.pictures.batch("standard", np.arange(number if most is None else min(most, number)))

    # --- model and loss -----------------------------------------------------------------------------------------

    def _model_config(self) -> DiffusionConfig:
        scenes, options = _options(self.config.data)
        derived = {
            "vocab_size": len(words_of_captions(scenes, options)),
            "image_size": scenes.image_size,
            "channels": 3,
        }
        return DiffusionConfig.from_dict({**self.config.model, **derived})

    def model(self) -> DiffusionUNet:
        """New weights."""
        return DiffusionUNet(self._model_config())

    def loss(self, model: nn.Module, batch: Batch, count: Tensor) -> Tensor:
        """As the class says."""
        return self.measure(model, batch).sum() / count

    def measure(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of each row, [N]."""
        unet, (x0, words, times, noise) = cast(DiffusionUNet, model), batch
        dtype = unet.first.weight.dtype
        x = noised(x0, noise, times)
        found = unet(x.to(dtype), times.to(dtype), words)
        _, share_N, _ = unet.scales(times)
        return ((found.float() - x0) / share_N).square().flatten(1).mean(1)

    # --- evaluation ---------------------------------------------------------------------------------------------

    def metrics(self, batch: Batch, measured: Tensor) -> dict[str, float]:
        """loss: the mean over rows."""
        return {"loss": float(measured.double().mean())}

    # --- results ------------------------------------------------------------------------------------------------

    def check_target(self, directory: Path) -> None:
        """Only an earlier model of its format is replaced."""
        trained_diffusion.check_target(directory)

    def save(self, directory: Path, model: nn.Module, metadata: dict[str, Any]) -> None:
        """As `attnzoo.vision.load_diffusion` reads it."""
        scenes, options = _options(self.config.data)
        data = {"source": "scenes", **asdict(scenes), "styles": list(options.styles)}
        trained = TrainedDiffusion(cast(DiffusionUNet, model), self.pictures.words, data, metadata)
        trained_diffusion.save_diffusion(directory, trained)


def _options(values: Mapping[str, Any]) -> tuple[SceneOptions, CaptionedOptions]:
    """Raises ValueError that names the key of `data`."""
    if values.get("source") != "scenes":
        raise ValueError(f"data.source={values.get('source')!r}: diffusion is trained on scenes; set it to scenes")
    own = {key: value for key, value in values.items() if key in CAPTIONED_KEYS}
    rest = {key: value for key, value in values.items() if key not in (*CAPTIONED_KEYS, "source")}
    known = [f.name for f in fields(SceneOptions)]
    for key in rest:
        if key not in known:
            raise ValueError(f"unknown key data.{key}{suggest(str(key), [*known, *CAPTIONED_KEYS])}")
    return build_config(SceneOptions, {**SCENES, **rest}, "data"), build_config(CaptionedOptions, own, "data")


def _check_model(values: Mapping[str, Any]) -> None:
    """Raises ValueError that names the key of `model`."""
    for key in FROM_DATA:
        if key in values:
            raise ValueError(f"model.{key}={values[key]!r}: the data determine it; leave it out")
    DiffusionConfig.from_dict({"vocab_size": 1, **values})
