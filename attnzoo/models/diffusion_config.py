"""Configuration of the diffusion model."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnzoo.models.config import attention_options
from attnzoo.types import CheckedConfig, build_config


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(CheckedConfig):
    """Sizes and choices of a `DiffusionUNet`.

    image_size: pixels of a side; channels: colours. patch: pixels of a side that become the channels of one place, so
    that the widest level has image_size / patch places a side. widths: channels of the levels, each of half the side of
    the one before. residual_blocks: of each level, on the way down and on the way up.
    attention: the variant of the image's self-attention, a name or a mapping with `kind: <name>`; it must take full
    masks. cross_attention: that from the image to the words, which must take a context too. text_attention: that of the
    text encoder, which must take full masks and keys.
    vocab_size, words: number of words, and the most of a caption. text_dim, text_layers: width and depth of the text
    encoder. data_deviation: root mean square of a pixel of the training images, which lie between -1 and 1.
    dropout: in residual blocks.
    """

    vocab_size: int
    image_size: int = 32
    channels: int = 3
    patch: int = 2
    widths: tuple[int, ...] = (64, 128)
    residual_blocks: int = 1
    num_heads: int = 4
    attention: str | dict = dataclasses.field(default_factory=lambda: {"kind": "mha", "position": "none"})
    cross_attention: str | dict = dataclasses.field(default_factory=lambda: {"kind": "mha", "position": "none"})
    text_attention: str | dict = dataclasses.field(default_factory=lambda: {"kind": "mha", "position": "none"})
    words: int = 16
    text_dim: int = 128
    text_layers: int = 2
    data_deviation: float = 0.5
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = (
            "vocab_size",
            "image_size",
            "channels",
            "patch",
            "residual_blocks",
            "num_heads",
            "words",
            "text_dim",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.text_layers < 0:
            raise ValueError(f"text_layers={self.text_layers} must be at least 0")
        if not self.widths or any(width < 1 for width in self.widths):
            raise ValueError(f"widths={list(self.widths)} must be channels of one level or more, each at least 1")
        side = self.patch * 2 ** (len(self.widths) - 1)
        if self.image_size % side:
            raise ValueError(
                f"image_size={self.image_size} must be a multiple of {side}: patch={self.patch}, halved by "
                f"{len(self.widths)} levels"
            )
        if not self.data_deviation > 0.0:
            raise ValueError(f"data_deviation={self.data_deviation} must be above 0")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")
        for width in self.widths:
            self.image_attention("attention", width)
            self.image_attention("cross_attention", width)
        self.image_attention("text_attention", self.text_dim)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DiffusionConfig":
        """Reads a mapping. Raises ValueError for unknown, missing or ill-typed keys and sizes that do not fit."""
        return build_config(cls, values, "model")

    def to_dict(self) -> dict[str, Any]:
        """A mapping that `from_dict` reads back and JSON can hold."""
        return dataclasses.asdict(self)

    def image_attention(self, name: str, width: int) -> tuple[str, dict[str, Any]]:
        """(kind, options) of the variant of the field `name` at a level, model_dim and num_heads filled in."""
        return attention_options(getattr(self, name), f"model.{name}", model_dim=width, num_heads=self.num_heads)

    def side(self, level: int) -> int:
        """Places of a side at a level."""
        return self.image_size // self.patch // 2**level
