"""The sections of a configuration of `task.kind=pictures`, and what is refused in them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from attnzoo.errors import suggest
from attnzoo.models import DecoderConfig, PictureConfig
from attnzoo.types import CheckedConfig, build_config, parse_dtype
from attnzoo.vision import SceneOptions
from attnzoo.vision.turns import TurnFormat
from train.config import Config
from train.data.scenes import SOURCE
from train.tasks.base import TaskOptions
from train.tokenizer import TokenizerConfig

LOSSES = ("patch_loss", "word_loss", "name_loss")
"""Keys of `task`: weights of what is learned besides answers."""


@dataclass(frozen=True, kw_only=True)
class QuestionOptions(TaskOptions, CheckedConfig):
    """turns: questions about each training picture; text_share: of them, about words alone. patch_loss: the weight of a
    second loss, by which the tower learns what is in each of its patches; 0: there is none. word_loss: that of a third
    one, by which a decoder that is trained, too, learns where the things are that words name; 0: there is none.
    name_loss: that of a fourth one, by which a picture's vectors learn to be near the embeddings of the names of what
    they show, so that a language model that has read much knows them; 0: there is none.
    questions: of each kind and split in validation, each about a picture of its own. texts: what stands around
    pictures, questions and answers."""

    turns: int = 6
    text_share: float = 0.35
    patch_loss: float = 0.0
    word_loss: float = 0.0
    name_loss: float = 0.0
    questions: int = 100
    texts: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("turns", "questions"):
            if getattr(self, name) < 1:
                raise ValueError(f"task.{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.text_share < 1:
            raise ValueError(f"task.text_share={self.text_share} must be at least 0 and below 1")
        for name in LOSSES:
            if getattr(self, name) < 0:
                raise ValueError(f"task.{name}={getattr(self, name)} must be a number of at least 0")
        self.format()

    def format(self) -> TurnFormat:
        """The texts. Raises ValueError that names the key."""
        return build_config(TurnFormat, self.texts, "task.texts")


@dataclass(frozen=True, kw_only=True)
class PictureModel(CheckedConfig):
    """vision: sizes of the tower. projector: what maps its vectors to the decoder's. decoder: a decoder that is trained
    too. language_model: in place of a decoder, a frozen language model, as `attnzoo.load` finds it. dtype: of the
    weights of the language model."""

    vision: dict = field(default_factory=dict)
    projector: dict = field(default_factory=dict)
    decoder: dict | None = None
    language_model: str | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_dtype(self.dtype)
        if (self.decoder is None) == (self.language_model is None):
            raise ValueError("give one of model.decoder (trained) and model.language_model (frozen)")
        if self.decoder is not None:
            if "vocab_size" in self.decoder:
                raise ValueError("model.decoder.vocab_size: the tokenizer determines it; leave it out")
            build_config(DecoderConfig, {**self.decoder, "vocab_size": 1}, "model.decoder")
        self.pictures(1, 1.0)

    def pictures(self, width: int, unit: float) -> PictureConfig:
        """Of the tower and the projector, for embeddings of that width and size."""
        values = {"vision": self.vision, "projector": self.projector, "width": width, "unit": unit}
        return PictureConfig.from_dict(values)


def scene_options(values: Mapping[str, Any]) -> SceneOptions:
    """The section `data` without its source."""
    return build_config(SceneOptions, {key: value for key, value in values.items() if key != "source"}, "data")


def check_questions(config: Config) -> None:
    """Raises ValueError that names the key of `task`."""
    options = build_config(QuestionOptions, config.task, "task")
    frozen = config.model.get("language_model") is not None and config.lora.rank is None
    if options.word_loss and frozen:
        raise ValueError(
            f"task.word_loss={options.word_loss} needs a decoder that is trained, and model.language_model is frozen; "
            "leave one out, or set lora.rank"
        )


def check_adapters(config: Config) -> None:
    """Raises ValueError that names the key where adapters (`lora`) have nothing to adapt."""
    if config.lora.rank is None:
        return
    if config.model.get("language_model") is None:
        raise ValueError(
            f"lora.rank={config.lora.rank} adapts model.language_model, and model.decoder is trained; leave it out"
        )
    dtype = config.model.get("dtype", "float32")
    if dtype != "float32":
        raise ValueError(
            f"lora.rank={config.lora.rank} with model.dtype={dtype}: adapters are merged into float32 weights; set "
            "model.dtype=float32, and precision=bf16_autocast for speed"
        )


def check_data(config: Config) -> None:
    """Raises ValueError that names the key of `data`."""
    source = config.data.get("source")
    if source != SOURCE:
        raise ValueError(f"data.source={source!r}{suggest(str(source), [SOURCE])}: task.kind=pictures reads {SOURCE!r}")
    options = scene_options(config.data)
    size = build_config(PictureModel, config.model, "model").pictures(1, 1.0).vision.image_size
    if size != options.image_size:
        raise ValueError(f"data.image_size={options.image_size} differs from model.vision.image_size={size}")


def check_tokenizer(config: Config) -> None:
    """Raises ValueError that names the key of `tokenizer`."""
    build_config(TokenizerConfig, config.tokenizer, "tokenizer")
    if config.model.get("language_model") is not None and config.tokenizer:
        key = next(iter(config.tokenizer))
        raise ValueError(f"tokenizer.{key}: model.language_model has its own tokenizer; leave the section out")
