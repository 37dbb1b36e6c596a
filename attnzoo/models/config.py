"""Configuration of the decoder language model: strict to read, complete to write."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from attnzoo.attention import slow_streaming, variant
from attnzoo.kvcache import build_cache
from attnzoo.types import build_config

AttentionSpec = str | dict[str, Any]
"""A variant's name, or {"kind": name, option: value, ...}."""
LIMITS = {
    "vocab_size": (1 << 31) - 1,
    "model_dim": (1 << 31) - 1,
    "num_layers": 1 << 16,
    "max_positions": (1 << 31) - 1,
    "mlp_dim": (1 << 31) - 1,
}
"""The largest sizes accepted: larger ones are mistakes, and numbers overflow."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and choices of a `DecoderLM`.

    attention: one variant for all layers, or a list that is repeated over the layers from the first one on, for example
    ["rcmha", "linear"]. attention_impl: the implementation of its operations; "auto" chooses by device, any other name
    is used or refused, never replaced. max_positions: the longest context the model is meant for; variants with a
    position table get a table of that length unless they set their own `max_distance`. mlp_dim: None means 4 *
    model_dim; for "swiglu", which has a third matrix, 8/3 * model_dim rounded up to a multiple of 32. init_std: of new
    weights; embedding_std: of new embeddings, None: init_std. cache: the cache policy that servers use by default,
    {"policy": name, option: value}; None: the full cache.
    """

    vocab_size: int
    model_dim: int
    num_layers: int
    attention: str | dict | list = "rcmha"
    attention_impl: Literal["auto", "reference", "torch", "triton"] = "auto"
    max_positions: int = 256
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = 1e-5
    mlp: Literal["swiglu", "gelu", "relu"] = "swiglu"
    mlp_dim: int | None = None
    mlp_bias: bool = False
    tie_embeddings: bool = True
    init_std: float = 0.02
    embedding_std: float | None = None
    cache: dict | None = None

    def __post_init__(self) -> None:
        for name, limit in LIMITS.items():
            value = getattr(self, name)
            if value is None:
                continue
            if value < 1:
                or_null = ", or null for the default" if name == "mlp_dim" else ""
                raise ValueError(f"{name}={value} must be at least 1{or_null}")
            if value > limit:
                raise ValueError(f"{name}={value} must be at most {limit}")
        for name in ("init_std", "embedding_std", "norm_eps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be a positive number")
        specs = self.attention if isinstance(self.attention, list) else [self.attention]
        if not specs:
            raise ValueError("attention=[] names no variant; give one, or a list that is repeated over the layers")
        if self.num_layers % len(specs):
            raise ValueError(
                f"attention lists {len(specs)} variants, which does not divide num_layers={self.num_layers}; "
                "the list is repeated over the layers"
            )
        for layer in range(len(specs)):
            self.layer_attention(layer)
        if self.cache is not None:
            policy = self.cache.get("policy", "")
            if not isinstance(policy, str):
                raise ValueError(f"cache.policy={policy!r} must be the name of a policy")
            build_cache(policy, {key: value for key, value in self.cache.items() if key != "policy"})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DecoderConfig":
        """Reads a mapping. Raises ValueError for unknown, missing or ill-typed keys and sizes that do not fit."""
        return build_config(cls, values, "model")

    def to_dict(self) -> dict[str, Any]:
        """A mapping that `from_dict` reads back and JSON can hold."""
        return dataclasses.asdict(self)

    def slow_streaming(self) -> list[str]:
        """A line for each variant of the model that streams by recomputation, for whoever serves it."""
        kinds = dict.fromkeys(self.layer_attention(layer)[0] for layer in range(self.num_layers))
        return [said for kind in kinds if (said := slow_streaming(kind)) is not None]

    def layer_attention(self, layer: int) -> tuple[str, dict[str, Any]]:
        """(kind, options) of the variant of layer `layer`, model_dim and table length filled in."""
        specs = self.attention if isinstance(self.attention, list) else [self.attention]
        spec = specs[layer % len(specs)]
        where = f"model.attention[{layer % len(specs)}]" if len(specs) > 1 else "model.attention"
        return attention_options(spec, where, model_dim=self.model_dim, max_distance=self.max_positions)

    @property
    def embedding_size(self) -> float:
        """The root mean square of new embeddings."""
        return self.init_std if self.embedding_std is None else self.embedding_std

    def hidden_width(self) -> int:
        """Width of the MLP's hidden layer."""
        if self.mlp_dim is not None:
            return self.mlp_dim
        if self.mlp == "swiglu":
            return -(-8 * self.model_dim // 3 // 32) * 32
        return 4 * self.model_dim


def attention_options(spec: Any, where: str, *, model_dim: int, **defaults: Any) -> tuple[str, dict[str, Any]]:
    """(kind, options) of the variant that a configuration names; model_dim is the model's, and `defaults` hold where
    the variant has such options. Raises ValueError that names `where` for what is no variant, or no option of it."""
    if isinstance(spec, str):
        spec = {"kind": spec}
    if not isinstance(spec, dict) or not isinstance(spec.get("kind"), str):
        raise ValueError(f"{where}={spec!r}: give a variant's name, or a mapping with `kind: <name>` and its options")
    kind, options = spec["kind"], {key: value for key, value in spec.items() if key != "kind"}
    config_class = variant(kind).Config
    if "model_dim" in options:
        raise ValueError(f"{where}.model_dim is the model's own; set model.model_dim")
    options["model_dim"] = model_dim
    for name in {field.name for field in dataclasses.fields(config_class)} & defaults.keys():
        options.setdefault(name, defaults[name])
    build_config(config_class, options, where)
    return kind, options
