"""Llama, Mistral, Qwen2 and Qwen3: how their config.json is read, with the defaults of transformers.

Only what changes the function is read. Keys that a family's class in transformers does not have are ignored there and
here; where transformers contradicts itself, the file is refused.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from attnzoo.models import DecoderConfig
from attnzoo.types import build_config

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "num_key_value_heads": None,
        "head_dim": None,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "mistral": {
        "num_key_value_heads": 8,
        "head_dim": None,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "layer_types": None,
    },
    "qwen2": {
        "num_key_value_heads": 32,
        "head_dim": None,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "use_sliding_window": False,
        "max_window_layers": 28,
        "layer_types": None,
    },
    "qwen3": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "attention_bias": False,
        "sliding_window": 4096,
        "use_sliding_window": False,
        "max_window_layers": 28,
        "layer_types": None,
    },
}
"""The keys that a family has beyond those common to all, with transformers' defaults. Layer sizes have none: a file
without them is damaged and is refused."""
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "hidden_act": ("silu",),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "is_causal": (None, True),
    "per_layer_config": (None, {}),
}
"""Keys that change the function in any family, with the values that leave it unchanged. Other values are refused."""
FULL, SLIDING = "full_attention", "sliding_attention"
LAYER_TYPES = {FULL: FULL, SLIDING: SLIDING, "attention": FULL}
"""How layers may be called; "attention" is an older name."""
ROPE_KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Kinds of rotary positions, and the keys that each reads."""
WINDOWS = ("sliding_window", "max_window_layers")
"""Numbers that matter only where a layer has a window."""
MAX_LAYERS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class FamilyConfig:
    """The keys of a config.json of these families that change the function. Older files have `rope_theta` and
    `rope_scaling`, newer ones both in `rope_parameters`. Raises ValueError naming the key.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    rope_parameters: dict | None = None
    original_max_position_embeddings: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    use_sliding_window: bool = False
    max_window_layers: int = 0
    layer_types: list | None = None
    initializer_range: float = 0.02

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> "FamilyConfig":
        """Reads a config.json, with transformers' defaults for missing keys. Raises ValueError naming the key."""
        family = content["model_type"]
        for key, neutral in UNSUPPORTED.items():
            if key in content and content[key] not in neutral:
                raise ValueError(f"{key}={content[key]!r} is not supported; give a checkpoint without it")
        defaults = DEFAULTS[family]
        if family == "llama":
            _refuse_windows(content)
        specific = {key for known in DEFAULTS.values() for key in known}
        known = {field.name for field in fields(cls)} - specific | defaults.keys()
        return build_config(cls, {**defaults, **{key: content[key] for key in content if key in known}}, "config")

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is int and field.name not in WINDOWS and value < 1:
                raise ValueError(f"{field.name}={value} must be at least 1")
            if type(value) is float and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{field.name}={value} must be a number of at least 0")
        if self.num_hidden_layers > MAX_LAYERS:
            raise ValueError(f"num_hidden_layers={self.num_hidden_layers} must be at most {MAX_LAYERS}")
        if self.model_type == "qwen3" and self.head_dim is None:
            raise ValueError("head_dim=None must be a number: Qwen3 has no rule for it")
        if self.layer_types is None:
            return
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types names {len(self.layer_types)} layers, num_hidden_layers={self.num_hidden_layers}"
            )
        for layer, kind in enumerate(self.layer_types):
            if not isinstance(kind, str) or kind not in LAYER_TYPES:
                raise ValueError(
                    f"layer_types[{layer}]={kind!r} is not supported; known: {', '.join(map(repr, LAYER_TYPES))}"
                )

    def decoder(self) -> DecoderConfig:
        """The configuration of our decoder that computes the same function. Raises ValueError where there is none."""
        windows = [self._window(layer) for layer in range(self.num_hidden_layers)]
        layers = {window: self._attention(window) for window in set(windows)}
        return DecoderConfig(
            vocab_size=self.vocab_size,
            model_dim=self.hidden_size,
            num_layers=self.num_hidden_layers,
            attention=layers[windows[0]] if len(layers) == 1 else [layers[window] for window in windows],
            max_positions=self.max_position_embeddings,
            norm_eps=self.rms_norm_eps,
            mlp_dim=self.intermediate_size,
            mlp_bias=self.mlp_bias,
            tie_embeddings=self.tie_word_embeddings,
            init_std=self.initializer_range or 0.02,
        )

    def _attention(self, window: int | None) -> dict[str, Any]:
        theta, scaling = self._rope()
        options: dict[str, Any] = {
            "kind": "mha",
            "num_heads": self.num_attention_heads,
            "num_kv_heads": self.num_key_value_heads or self.num_attention_heads,
            "head_dim": self.head_dim or self.hidden_size // self.num_attention_heads,
            "rope_theta": theta,
            "rope_scaling": scaling,
            "window": window,
            "qkv_bias": self.attention_bias or self.model_type == "qwen2",
            "output_bias": self.attention_bias,
        }
        if self.model_type == "qwen3":
            options |= {"qk_norm": True, "norm_eps": self.rms_norm_eps}
        return options

    def _window(self, layer: int) -> int | None:
        """The window of a layer, by its type or (Qwen) its number; None for full attention. Raises ValueError where a
        sliding layer has no window size."""
        window = self.sliding_window if self.model_type == "mistral" or self.use_sliding_window else None
        if self.layer_types is None:
            sliding = self.model_type == "mistral" or (self.use_sliding_window and layer >= self.max_window_layers)
            return window if sliding else None
        if LAYER_TYPES[self.layer_types[layer]] == FULL:
            return None
        if window is None:
            raise ValueError(
                f"layer_types[{layer}]={SLIDING!r}, and sliding_window={self.sliding_window}, use_sliding_window="
                f"{self.use_sliding_window} name no window; which of them is meant?"
            )
        return window

    def _rope(self) -> tuple[float, dict[str, Any] | None]:
        """(theta, options of `RopeScaling`), from `rope_scaling` or `rope_parameters` in the order of transformers."""
        place = "rope_scaling" if self.rope_scaling else "rope_parameters"
        rope = dict(self.rope_scaling or self.rope_parameters or {})
        theta = rope.pop("rope_theta", self.rope_theta)
        if type(theta) not in (int, float) or not math.isfinite(theta) or theta <= 0:
            raise ValueError(f"{place}.rope_theta={theta!r} must be a positive number")
        kind = rope.pop("rope_type", rope.get("type", "default"))
        rope.pop("type", None)
        if not isinstance(kind, str) or kind not in ROPE_KEYS:
            raise ValueError(f"{place}.rope_type={kind!r} is not supported; known: {', '.join(ROPE_KEYS)}")
        if rope.get("partial_rotary_factor") in UNSUPPORTED["partial_rotary_factor"]:
            rope.pop("partial_rotary_factor", None)
        unknown = {key: value for key, value in rope.items() if key not in ROPE_KEYS[kind] and value is not None}
        for key, value in unknown.items():
            layered = "one rule for each layer type is not supported" if isinstance(value, dict) else "not read"
            raise ValueError(
                f"{place}.{key}={value!r} with rope_type={kind!r}: {layered}; known for it: "
                f"{', '.join(('rope_theta', *ROPE_KEYS[kind]))}"
            )
        return float(theta), self._scaling(kind, rope)

    def _scaling(self, kind: str, rope: Mapping[str, Any]) -> dict[str, Any] | None:
        if kind == "default":
            return None
        if kind == "linear":
            return {"kind": "linear", "factor": rope.get("factor")}
        before = rope.get("original_max_position_embeddings")
        if self.original_max_position_embeddings is not None:
            before = self.original_max_position_embeddings  # which transformers prefers to the one in the rule
        return {
            "kind": "llama3",
            "factor": rope.get("factor"),
            "low_freq_factor": rope.get("low_freq_factor"),
            "high_freq_factor": rope.get("high_freq_factor"),
            "original_max_positions": self.max_position_embeddings if before is None else before,
        }


def _refuse_windows(content: Mapping[str, Any]) -> None:
    """Llama's class has no window, but its cache in transformers uses one from the file: forward and generate differ.

    Raises ValueError.
    """
    window, layers = content.get("sliding_window"), content.get("layer_types")
    if window is not None and content.get("use_sliding_window") is not False:
        raise ValueError(f"sliding_window={window!r} is no key of Llama; set it to null, or model_type to 'mistral'")
    if layers is not None and not (isinstance(layers, list) and all(kind in ("attention", FULL) for kind in layers)):
        raise ValueError(f"layer_types={layers!r} is no key of Llama, whose layers see all tokens; leave it out")
