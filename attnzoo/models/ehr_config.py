"""Configuration of the clinical encoder."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from attnzoo.models.config import attention_options
from attnzoo.types import CheckedConfig, build_config


@dataclass(frozen=True, kw_only=True)
class EhrConfig(CheckedConfig):
    """Sizes and choices of an `EhrEncoder`.

    variables, statics, outputs: how many there are. hourly: logits for every hour, from what was known by then; else
    one prediction a stay. head: "linear" for independent outputs; "ordinal" for outputs that are P(bucket > k), which
    fall with k.
    branches: tokens are hours (temporal), variables (spatial), or both. flavor: TSCAN as the paper or as its authors'
    code has it (values of the cross attention, norms, masks). attention: the variant of self-attention, a name or a
    mapping with `kind: <name>`; it must take full masks, keys and pairs.
    clock: whether tokens are told how many hours were before their chunk, not their place in it alone.
    chunks: encoders along time; chunk_hours: hours of a chunk. share_fusion: all fusion encoders are one, and stays may
    be longer than chunks * chunk_hours.
    summary: a head on the last, first, mean, smallest and largest value, deviation, trend, count, share and recency of
    each variable: linear, with a hidden layer, or none.
    combine: "sum" adds the logits of all branches and the summary head, and they learn from one loss. "mean": each has
    logits and a loss of its own; half the mean of the branches and half the summary head's are told.
    dropout: of what is added to the residual stream, and before the head. hide_variables, hide_hours: in training a
    variable is hidden with this probability, and hours with one that is drawn between 0 and this for each stay.
    """

    variables: int
    statics: int = 0
    outputs: int = 1
    hourly: bool = False
    head: Literal["linear", "ordinal"] = "linear"
    branches: Literal["both", "temporal", "spatial"] = "both"
    flavor: Literal["paper", "official"] = "paper"
    attention: str | dict = dataclasses.field(default_factory=lambda: {"kind": "mha", "position": "none"})
    model_dim: int = 32
    num_heads: int = 4
    mlp_dim: int = 96
    chunks: int = 4
    chunk_hours: int = 12
    share_fusion: bool = False
    clock: bool = False
    summary: Literal["linear", "mlp", "none"] = "linear"
    combine: Literal["sum", "mean"] = "sum"
    dropout: float = 0.3
    hide_variables: float = 0.2
    hide_hours: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("variables", "outputs", "model_dim", "num_heads", "mlp_dim", "chunks", "chunk_hours"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.statics < 0:
            raise ValueError(f"statics={self.statics} must be at least 0")
        for name in ("dropout", "hide_variables", "hide_hours"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        self.self_attention()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EhrConfig":
        """Reads a mapping. Raises ValueError for unknown, missing or ill-typed keys and sizes that do not fit."""
        return build_config(cls, values, "model")

    def to_dict(self) -> dict[str, Any]:
        """A mapping that `from_dict` reads back and JSON can hold."""
        return dataclasses.asdict(self)

    def self_attention(self) -> tuple[str, dict[str, Any]]:
        """(kind, options) of the variant of self-attention, model_dim and num_heads filled in."""
        return attention_options(self.attention, "model.attention", model_dim=self.model_dim, num_heads=self.num_heads)

    @property
    def width(self) -> int:
        """Channels of what is fused for the head: three vectors of each branch."""
        return 3 * self.model_dim * (2 if self.branches == "both" else 1)

    @property
    def longest(self) -> int | None:
        """The most hours of a stay; None: any number."""
        return None if self.share_fusion and self.chunks > 1 else self.chunks * self.chunk_hours
