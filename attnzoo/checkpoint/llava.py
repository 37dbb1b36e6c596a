"""Directories of transformers with models of type LLaVA: a CLIP tower, a projector of two maps, and a decoder.

Only data of config.json are read, and no code that it names. A picture's placeholders must stand in the text as often
as the tower has patches, as transformers' processor writes them.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnzoo.checkpoint import finite
from attnzoo.checkpoint.base import Checkpoint, Piece, check_shapes
from attnzoo.checkpoint.huggingface import read_config
from attnzoo.checkpoint.load import read_model
from attnzoo.checkpoint.names import HUGGING_FACE, rename
from attnzoo.checkpoint.native import CONFIG
from attnzoo.checkpoint.shards import Shards
from attnzoo.files import read_object
from attnzoo.models import MultimodalLM, PictureConfig, PictureEncoder
from attnzoo.models.shapes import without_storage

CLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
"""transformers' defaults for keys that a config.json lacks."""
HEAD = "lm_head.weight"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""By which CLIP's processor standardises channels."""
MODULES: Mapping[str, str] = {
    "class_token": "embeddings.class_embedding",
    "patch": "embeddings.patch_embedding",
    "position": "embeddings.position_embedding.weight",
    "input_norm": "pre_layrnorm",
    "blocks": "encoder.layers",
    "attention_norm": "layer_norm1",
    "attention.projection.query": "self_attn.q_proj",
    "attention.projection.key": "self_attn.k_proj",
    "attention.projection.value": "self_attn.v_proj",
    "attention.projection.output": "self_attn.out_proj",
    "mlp_norm": "layer_norm2",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}
"""Our module names, and those of CLIP's tower in transformers. Names in a block lack its number."""


def load_llava(
    path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> MultimodalLM:
    """Reads a model in evaluation mode. dtype: as of `load_model`. Raises ValueError that names the file and what is
    wrong with it, or the key that has no counterpart."""
    path = Path(path)
    try:
        content = read_object(path / CONFIG)
    except FileNotFoundError:
        raise ValueError(f"{path / CONFIG} does not exist; give a directory written by transformers") from None
    if content.get("model_type") != "llava":
        raise ValueError(f"{path / CONFIG}: model_type={content.get('model_type')!r} is not 'llava'")
    decoder_config = read_config(content.get("text_config", {}), path / CONFIG)
    try:
        vision, projector = _sections(content)
        values = {"vision": vision, "projector": projector, "width": decoder_config.model_dim, "unit": 1.0}
        config = PictureConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path / CONFIG}: {error}") from None
    shards = Shards.of(path)
    names = {_short(name): name for name in shards.shapes}

    def decoder_name(own: str) -> str:
        short = rename(own, HUGGING_FACE)
        return short if short == HEAD else f"language_model.{short.removeprefix('model.')}"

    decoder_names = {short for short in names if short.startswith(("language_model.", "lm_head."))}

    def pieces(wanted: set[str]) -> Iterator[Piece]:
        return ((_short(name), first, rows) for name, first, rows in shards.read() if _short(name) in wanted)

    lm = read_model(
        Checkpoint(
            path=path,
            config=decoder_config,
            shapes={short: shards.shapes[names[short]] for short in decoder_names},
            read=lambda: pieces(decoder_names),
            dtypes={short: shards.dtypes[names[short]] for short in names},
            name=decoder_name,
            ignored=lambda short: short.endswith("inv_freq") or (decoder_config.tie_embeddings and short == HEAD),
        ),
        device=device,
        dtype=dtype,
    )
    with without_storage():
        encoder = PictureEncoder(config)
    encoder = encoder.to_empty(device=device).to(lm.embedding.weight.dtype)
    own = {picture_name(name): tensor for name, tensor in encoder.state_dict().items()}
    rest = {short: shards.shapes[names[short]] for short in names.keys() - decoder_names if not _unused(short, config)}
    check_shapes(path, rest, {name: _their_shape(name, tensor, config) for name, tensor in own.items()})
    for short, first, rows in pieces(set(rest)):
        target = own[short][first : first + len(rows)]
        target.copy_(rows.flatten(1) if rows.dim() > 2 else rows)  # a convolution's kernel is a matrix here
        finite.check_finite(path, short, first, rows, target)
    return MultimodalLM(encoder, lm, _image_token(content, path)).eval().requires_grad_(False)


def _sections(content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our sections of tower and projector. Raises ValueError that names a key without a counterpart."""
    tower = {**CLIP, **content.get("vision_config", {})}
    for key, value, known in (
        ("vision_config.model_type", tower.get("model_type", "clip_vision_model"), ("clip_vision_model",)),
        ("vision_config.hidden_act", tower["hidden_act"], ("quick_gelu", "gelu")),
        ("projector_hidden_act", content.get("projector_hidden_act", "gelu"), ("gelu",)),
        ("multimodal_projector_bias", content.get("multimodal_projector_bias", True), (True,)),
        ("vision_feature_select_strategy", content.get("vision_feature_select_strategy", "default"), ("default",)),
    ):
        if value not in known:
            raise ValueError(f"{key}={value!r} is not supported; known: {', '.join(map(repr, known))}")
    layers, read_from = tower["num_hidden_layers"], content.get("vision_feature_layer", -2)
    if (
        not isinstance(read_from, int)
        or not 0 < (used := read_from if read_from >= 0 else layers + 1 + read_from) <= layers
    ):
        raise ValueError(f"vision_feature_layer={read_from!r} must be one of the tower's {layers} layers")
    heads = {"num_heads": tower["num_attention_heads"], "position": "none", "qkv_bias": True, "output_bias": True}
    vision = {
        "image_size": tower["image_size"],
        "patch_size": tower["patch_size"],
        "channels": tower["num_channels"],
        "model_dim": tower["hidden_size"],
        "num_layers": used,
        "attention": {"kind": "mha", **heads},
        "norm_eps": tower["layer_norm_eps"],
        "mlp": tower["hidden_act"],
        "mlp_dim": tower["intermediate_size"],
        "patch_bias": False,
        "class_token": True,
        "input_norm": True,
        "final_norm": False,
        "mean": MEAN,
        "std": STD,
    }
    return vision, {"hidden": content["text_config"]["hidden_size"]}


def _image_token(content: Mapping[str, Any], path: Path) -> int:
    found = content.get("image_token_index", content.get("image_token_id"))
    if not isinstance(found, int):
        raise ValueError(f"{path / CONFIG}: image_token_index={found!r} must be the id of the placeholder")
    return found


def _short(name: str) -> str:
    """A tensor's name without what versions of transformers put around it."""
    name = name.removeprefix("model.").replace("language_model.model.", "language_model.")
    return name.replace("language_model.lm_head.", "lm_head.").replace("vision_tower.vision_model.", "vision_tower.")


def picture_name(own: str) -> str:
    """The short name of a tensor of `PictureEncoder`.

    >>> picture_name("vision.blocks.1.mlp.up.weight")
    'vision_tower.encoder.layers.1.mlp.fc1.weight'
    """
    module = own.removeprefix("vision.")
    if module == own:
        return own.replace("hidden.", "multi_modal_projector.linear_1.").replace(
            "output.", "multi_modal_projector.linear_2."
        )
    return f"vision_tower.{MODULES.get(module) or rename(module, MODULES)}"


def _unused(short: str, config: PictureConfig) -> bool:
    """Whether the tower has a tensor that LLaVA does not use: layers behind the one that is read, and the last norm."""
    layer = short.removeprefix("vision_tower.encoder.layers.").partition(".")[0]
    beyond = layer.isdigit() and int(layer) >= config.vision.num_layers
    return beyond or short.startswith("vision_tower.post_layernorm.") or short.endswith("position_ids")


def _their_shape(short: str, tensor: Tensor, config: PictureConfig) -> tuple[int, ...]:
    if not short.endswith("patch_embedding.weight"):
        return tuple(tensor.shape)
    vision = config.vision
    return (len(tensor), vision.channels, vision.patch_size, vision.patch_size)
