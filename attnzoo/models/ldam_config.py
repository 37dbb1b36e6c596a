"""Configuration of LDAM."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from attnzoo.models.config import attention_options
from attnzoo.types import CheckedConfig, build_config

Texts = tuple[tuple[int, ...], ...]
"""Texts as token ids."""


@dataclass(frozen=True, kw_only=True)
class LdamConfig(CheckedConfig):
    """Sizes and choices of an `Ldam`.

    definitions: the definition of every label, as token ids; there is an output for each. variables: the description of
    every variable of the series, as token ids; none: text alone. channels: numbers of a cell of the series.
    labels: "definitions", or "none", the ablation: one learned vector stands in the place of all definitions.
    describe_series: a variable's description is added to what its series has become; without it, only the variable's
    weight says which variable a series is of.
    attention: the variant of the text encoder, a name or a mapping with `kind: <name>`; it must take full masks and
    keys. window: tokens (and variables) that the convolution over label scores spans, odd.
    dropout: of encoded tokens and of the fused vector. label_loss: weight of the loss that tells each definition from
    the others.
    exclusive: exactly one label is 1, so that logits are those of a softmax over labels, not of a sigmoid each.
    pooling: "shared": words have the same weights for all labels, by the label that speaks most for each (the paper);
    "each": every label weighs words by its own evidence. mean: the mean of words joins the weighted sum, through a
    layer of both. skip: a linear head on the tf-idf weights of words is added to the logits; whoever trains sets the
    buffer `rarity_W`. hide_words: share of the words that training takes for unknown ones (id 0), others each time.
    read_definitions: the loss that tells each definition from the others reads them as texts, by all parts of the
    model; else by its value map and head alone (the paper).
    """

    vocab_size: int
    definitions: tuple[tuple[int, ...], ...]
    variables: tuple[tuple[int, ...], ...] = ()
    channels: int = 4
    labels: Literal["definitions", "none"] = "definitions"
    describe_series: bool = True
    attention: str | dict = "mha"
    model_dim: int = 64
    num_heads: int = 4
    mlp_dim: int = 128
    num_layers: int = 1
    window: int = 3
    dropout: float = 0.1
    label_loss: float = 1.0
    exclusive: bool = False
    pooling: Literal["shared", "each"] = "shared"
    mean: bool = False
    skip: bool = False
    hide_words: float = 0.0
    read_definitions: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vocab_size", "channels", "model_dim", "num_heads", "mlp_dim", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_layers < 0:
            raise ValueError(f"num_layers={self.num_layers} must be at least 0")
        if self.window % 2 == 0:
            raise ValueError(f"window={self.window} must be odd, as many tokens before as after")
        if self.variables and self.model_dim % 2:
            raise ValueError(f"model_dim={self.model_dim} must be even: a GRU in each direction has half of it")
        for name in ("dropout", "hide_words"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        if self.label_loss < 0.0:
            raise ValueError(f"label_loss={self.label_loss} must be at least 0")
        if not self.definitions:
            raise ValueError("definitions=() has no label; give the token ids of each label's definition")
        for name in ("definitions", "variables"):
            self._check_texts(name, getattr(self, name))
        self.text_attention()

    def _check_texts(self, name: str, texts: Texts) -> None:
        for number, ids in enumerate(texts):
            if not ids:
                raise ValueError(f"{name}[{number}] is empty; a text has at least one token")
            wrong = [i for i in ids if not 0 <= i < self.vocab_size]
            if wrong:
                raise ValueError(f"{name}[{number}] holds token id {wrong[0]}; vocab_size={self.vocab_size}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LdamConfig":
        """Reads a mapping. Raises ValueError for unknown, missing or ill-typed keys and sizes that do not fit."""
        return build_config(cls, values, "model")

    def to_dict(self) -> dict[str, Any]:
        """A mapping that `from_dict` reads back and JSON can hold."""
        return dataclasses.asdict(self)

    def text_attention(self) -> tuple[str, dict[str, Any]]:
        """(kind, options) of the text encoder's variant, model_dim and num_heads filled in."""
        return attention_options(self.attention, "model.attention", model_dim=self.model_dim, num_heads=self.num_heads)
