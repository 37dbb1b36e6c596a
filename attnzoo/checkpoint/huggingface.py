"""Directories as transformers writes them: Llama, Mistral, Qwen2 and Qwen3, read as configurations of one decoder.

Only numbers and names of config.json are read. `auto_map` and whatever else names code is never followed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from attnzoo.attention import PLUGINS_VARIABLE
from attnzoo.checkpoint.base import Checkpoint
from attnzoo.checkpoint.names import HUGGING_FACE, rename
from attnzoo.checkpoint.shards import Shards
from attnzoo.models import DecoderConfig
from attnzoo.types import build_config

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
OWN = "attnzoo"
"""The model type of `attnzoo.hf`: our configuration under "decoder", our names below "model"."""
UNSUPPORTED = {
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "hidden_act": ("silu",),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
}
"""Keys that change the function, and the values under which they do not."""


@dataclass(frozen=True, kw_only=True)
class FamilyConfig:
    """What a config.json of these families says about the function, under the names it has there.

    Older files have `rope_theta` and `rope_scaling`, newer ones both in `rope_parameters`.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    rope_parameters: dict | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    use_sliding_window: bool = False
    max_window_layers: int | None = None
    layer_types: list | None = None
    initializer_range: float = 0.02

    def decoder(self) -> DecoderConfig:
        """The same function as our decoder's configuration. Raises ValueError for what it cannot compute."""
        layers = [self._attention(self._window(layer)) for layer in range(self.num_hidden_layers)]
        same = all(layer == layers[0] for layer in layers)
        return DecoderConfig(
            vocab_size=self.vocab_size,
            model_dim=self.hidden_size,
            num_layers=self.num_hidden_layers,
            attention=layers[0] if same else layers,
            max_positions=self.max_position_embeddings,
            norm_eps=self.rms_norm_eps,
            mlp_dim=self.intermediate_size,
            mlp_bias=self.mlp_bias,
            tie_embeddings=self.tie_word_embeddings,
            init_std=self.initializer_range or 0.02,
        )

    def _attention(self, window: int | None) -> dict[str, Any]:
        rope = {"rope_theta": self.rope_theta, **(self.rope_scaling or {}), **(self.rope_parameters or {})}
        theta = rope.pop("rope_theta")
        options: dict[str, Any] = {
            "kind": "mha",
            "num_heads": self.num_attention_heads,
            "num_kv_heads": self.num_key_value_heads or self.num_attention_heads,
            "head_dim": self.head_dim or self.hidden_size // self.num_attention_heads,
            "rope_theta": float(theta),
            "rope_scaling": scaling(rope),
            "window": window,
            "qkv_bias": self.attention_bias or self.model_type == "qwen2",
            "output_bias": self.attention_bias,
        }
        if self.model_type == "qwen3":
            options |= {"qk_norm": True, "norm_eps": self.rms_norm_eps}
        return options

    def _window(self, layer: int) -> int | None:
        """Mistral has its window in every layer; Qwen's layers say so, one by one or from a number on."""
        if self.model_type == "mistral":
            return self.sliding_window
        if self.model_type == "llama" or not self.use_sliding_window:
            return None
        if self.layer_types is not None:
            return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None
        first = self.num_hidden_layers if self.max_window_layers is None else self.max_window_layers
        return self.sliding_window if layer >= first else None


def scaling(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    """Options of `RopeScaling` from `rope_scaling` or `rope_parameters`. Raises ValueError for an unknown kind."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return {"kind": "linear", "factor": rope.get("factor")}
    if kind == "llama3":
        return {
            "kind": "llama3",
            "factor": rope.get("factor"),
            "low_freq_factor": rope.get("low_freq_factor"),
            "high_freq_factor": rope.get("high_freq_factor"),
            "original_max_positions": rope.get("original_max_position_embeddings"),
        }
    raise ValueError(f"rope_type={kind!r} is not supported; known: default, linear, llama3")


def read_config(content: Mapping[str, Any], path: Path) -> DecoderConfig:
    """The configuration in a config.json, of a family or of our own type. Raises ValueError naming file and key."""
    family = content.get("model_type")
    if family == OWN:
        return _own_config(content, path)
    if family not in FAMILIES:
        raise ValueError(f"{path}: model_type={family!r} is not supported; known: {', '.join(FAMILIES)}, {OWN}")
    for key, neutral in UNSUPPORTED.items():
        if key in content and content[key] not in neutral:
            raise ValueError(f"{path}: {key}={content[key]!r} is not supported; give a checkpoint without it")
    known = {field.name for field in fields(FamilyConfig)}
    try:
        config = build_config(FamilyConfig, {key: content[key] for key in content if key in known}, "config")
        if config.layer_types is not None and len(config.layer_types) != config.num_hidden_layers:
            raise ValueError(
                f"layer_types names {len(config.layer_types)} layers, num_hidden_layers={config.num_hidden_layers}"
            )
        return config.decoder()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _own_config(content: Mapping[str, Any], path: Path) -> DecoderConfig:
    try:
        return DecoderConfig.from_dict(content["decoder"])
    except (KeyError, TypeError, ValueError) as error:
        way_out = "" if PLUGINS_VARIABLE in str(error) else "; export the model again"
        raise ValueError(f"{path}: decoder: {error}{way_out}") from None


def open_directory(directory: Path, content: Mapping[str, Any], config_path: Path) -> Checkpoint:
    """The model in a directory of transformers, `content` being its config.json. Raises ValueError naming the file."""
    own_type = content["model_type"] == OWN
    config, shards = read_config(content, config_path), Shards.of(directory, integers=own_type)
    tied = config.tie_embeddings
    return Checkpoint(
        path=directory,
        config=config,
        shapes=shards.shapes,
        read=shards.read,
        dtype=shards.main_dtype(),
        name=lambda own: f"model.{own}" if own_type else rename(own, HUGGING_FACE),
        # Older files carry the rotary frequencies; of a tied head there may be a copy.
        ignored=lambda name: (
            name.endswith("rotary_emb.inv_freq") or (tied and name in ("lm_head.weight", "model.head.weight"))
        ),
    )
