"""Exports our models as Llama, Mistral, Qwen2 or Qwen3, which transformers loads without this project.

The inverse of `attnzoo.checkpoint.huggingface`: what is written here loads there as the same model.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from attnzoo.attention.mha import MHAConfig
from attnzoo.attention.parts import Heads
from attnzoo.checkpoint.names import HUGGING_FACE, rename
from attnzoo.checkpoint.native import CONFIG
from attnzoo.checkpoint.shards import WEIGHTS
from attnzoo.checkpoint.target import check_export_target, place_export
from attnzoo.files import real_path, temporary_directory
from attnzoo.models import DecoderConfig, DecoderLM
from attnzoo.ops.rope import RopeScaling
from attnzoo.types import build_config

if TYPE_CHECKING:
    from attnzoo.tokenizer import Tokenizer

GENERATION = "generation_config.json"
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def export_model(directory: Path, model: DecoderLM, *, tokenizer: "Tokenizer | None" = None) -> Path:
    """Writes `model` as a directory of transformers; returns the directory.

    `AutoModelForCausalLM.from_pretrained` loads it without this project, and `load_model` loads the same model; only
    `attention_impl` and `cache`, which do not change the function, are not written. Raises ValueError, naming the
    option, for a model that no family computes, for a tokenizer with more ids than the model, and for a directory that
    holds anything but an earlier export (`attnzoo.checkpoint.target`).
    """
    directory = real_path(directory)
    check_export_target(directory)
    content = family_config(model.config)
    content["dtype"] = str(model.embedding.weight.dtype).removeprefix("torch.")
    tensors = {
        rename(name, HUGGING_FACE): tensor.detach().contiguous().cpu()
        for name, tensor in model.state_dict().items()
        if not (model.config.tie_embeddings and name == "head.weight")
    }
    temporary = temporary_directory(directory)
    try:
        save_file(tensors, str(temporary / WEIGHTS), metadata={"format": "pt"})
        ids = save_tokenizer(temporary, tokenizer, model.config.vocab_size)
        # Only the generation config names padding: here it would exclude that token's embedding from training.
        content |= {"bos_token_id": ids.get("bos_token_id"), "eos_token_id": ids.get("eos_token_id")}
        write_json(temporary / CONFIG, content)
        return place_export(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_tokenizer(directory: Path, tokenizer: "Tokenizer | None", vocab_size: int) -> dict[str, Any]:
    """Writes the tokenizer and generation_config.json into a directory; returns the latter.

    A tokenizer trained here becomes a tokenizer.json with the same ids, and its tokenizer.model is kept beside it.
    Raises ValueError for a tokenizer that knows more ids than `vocab_size`.
    """
    if tokenizer is None:
        write_json(directory / GENERATION, {})
        return {}
    from attnzoo.tokenizer import SentencePieceTokenizer
    from attnzoo.tokenizer.convert import to_huggingface

    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model vocab_size={vocab_size}; "
            "give the tokenizer that the model was trained with"
        )
    tokenizer.save(directory)
    if isinstance(tokenizer, SentencePieceTokenizer):
        to_huggingface(tokenizer).save(directory)
    stops = sorted(tokenizer.stop_ids, key=lambda token: (token != tokenizer.eos_id, token))
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        "pad_token_id": tokenizer.pad_id,
    }
    content = {name: value for name, value in ids.items() if value is not None}
    path = directory / GENERATION
    if path.is_file():  # copied from the tokenizer's checkpoint, and may also say how to sample
        content |= json.loads(path.read_text(encoding="utf-8"))
    write_json(path, content)
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes indented JSON in UTF-8."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def family_config(config: DecoderConfig) -> dict[str, Any]:
    """The config.json under which transformers computes the same function, without dtype and token ids.

    Raises ValueError naming the option that no family has.
    """
    for name, value in (("norm", "rmsnorm"), ("mlp", "swiglu")):
        if getattr(config, name) != value:
            raise _refusal(f"model.{name}={getattr(config, name)!r}, where all of them have {value!r}")
    layers = [_layer(config, number) for number in range(config.num_layers)]
    windows = [layer.window for layer in layers]
    for number, layer in enumerate(layers):
        for field in fields(MHAConfig):
            if field.name != "window" and getattr(layer, field.name) != getattr(layers[0], field.name):
                raise _refusal(
                    f"model.attention: {field.name}={getattr(layer, field.name)!r} in layer {number} and "
                    f"{getattr(layers[0], field.name)!r} in layer 0, where their layers differ in the window alone"
                )
    first = replace(layers[0], window=None)
    family = _family(config, first, windows)
    scaling = _scaling(first)
    return {
        "architectures": [CLASSES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_dim,
        "intermediate_size": config.hidden_width(),
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": first.num_heads,
        "num_key_value_heads": first.num_kv_heads,
        "head_dim": first.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_theta": first.rope_theta, **(scaling or {"rope_type": "default"})},
        # The keys of transformers 4 and other readers; without them they would use a default.
        "rope_theta": first.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tie_embeddings,
        # Only the initialisation of new weights, where Llama refuses more than 1.
        "initializer_range": min(config.init_std, 1.0),
        **_family_options(family, config, first, windows),
    }


def _layer(config: DecoderConfig, number: int) -> MHAConfig:
    """Options of a layer with defaults, in one spelling. Raises ValueError for an option that no family has."""
    kind, options = config.layer_attention(number)
    if kind != "mha":
        raise _refusal(f"model.attention: kind={kind!r} in layer {number}, where all of them have 'mha'")
    layer = build_config(MHAConfig, options, "model.attention")
    if layer.position != "rope":
        raise _refusal(f"model.attention: position={layer.position!r}, where all of them have 'rope'")
    if layer.sinks:
        raise _refusal(f"model.attention: sinks={layer.sinks}, where none of them has sinks")
    heads = Heads.of(layer.model_dim, layer.num_heads, layer.num_kv_heads, layer.head_dim)
    scaling = RopeScaling.of(layer.rope_scaling)
    return replace(
        layer,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        rope_scaling=None if scaling is None else asdict(scaling),
        norm_eps=layer.norm_eps if layer.qk_norm else MHAConfig.norm_eps,
    )


def _family(config: DecoderConfig, layer: MHAConfig, windows: Sequence[int | None]) -> str:
    """The family that has these biases, norms and windows. Raises ValueError naming the option that none has."""
    sizes = sorted({window for window in windows if window is not None})
    if len(sizes) > 1:
        raise _refusal(f"model.attention: window={sizes[0]} and window={sizes[1]}, where all windows have one size")
    if layer.output_bias and not layer.qkv_bias:
        raise _refusal("model.attention: output_bias=True with qkv_bias=False")
    if layer.qk_norm:
        if layer.norm_eps != config.norm_eps:
            raise _refusal(
                f"model.attention: norm_eps={layer.norm_eps} of qk_norm and model.norm_eps={config.norm_eps}, where "
                "the one that has qk_norm (Qwen3) has a single epsilon"
            )
        if layer.qkv_bias != layer.output_bias:
            raise _refusal("model.attention: qk_norm=True and qkv_bias=True with output_bias=False")
        if config.mlp_bias:
            raise _refusal("model.mlp_bias=True with qk_norm=True")
        return "qwen3"
    if layer.qkv_bias and not layer.output_bias:
        if config.mlp_bias:
            raise _refusal("model.mlp_bias=True with qkv_bias=True and output_bias=False")
        return "qwen2"
    plain = not (layer.qkv_bias or config.mlp_bias)
    if sizes and None in windows:
        raise _refusal(
            f"model.attention: window={sizes[0]} in some layers only, where those that have this (Qwen2, Qwen3) have "
            "qkv_bias without output_bias, or qk_norm"
        )
    if sizes and not plain:
        bias = "model.mlp_bias" if config.mlp_bias else "model.attention: output_bias"
        raise _refusal(f"{bias}=True with window={sizes[0]}")
    if sizes:
        return "mistral"
    if config.model_dim % layer.num_heads == 0:
        return "llama"
    # Llama's configuration refuses this head count, Mistral's without a window does not.
    if not plain:
        raise _refusal(
            f"model.attention: num_heads={layer.num_heads} does not divide model.model_dim={config.model_dim}, with "
            "biases"
        )
    return "mistral"


def _family_options(
    family: str, config: DecoderConfig, layer: MHAConfig, windows: Sequence[int | None]
) -> dict[str, Any]:
    """The keys that only some families have."""
    window = next((window for window in windows if window is not None), None)
    if family == "llama":
        return {"attention_bias": layer.qkv_bias, "mlp_bias": config.mlp_bias}
    if family == "mistral":
        return {"sliding_window": window}
    options = {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": config.num_layers,
        "layer_types": ["full_attention" if one is None else "sliding_attention" for one in windows],
    }
    return options | ({"attention_bias": layer.qkv_bias} if family == "qwen3" else {})


def _scaling(layer: MHAConfig) -> dict[str, Any] | None:
    """`rope_scaling` as transformers spells it."""
    scaling = RopeScaling.of(layer.rope_scaling)
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }


def _refusal(what: str) -> ValueError:
    return ValueError(
        f"no family of transformers that is known here ({', '.join(CLASSES)}) has {what}; attnzoo.hf exports the model "
        "as a model type of its own: attnzoo export --format attnzoo"
    )
