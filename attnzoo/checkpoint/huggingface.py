"""Directories as transformers writes them: reads Llama, Mistral, Qwen2 and Qwen3 as configurations of our decoder.

Only data of config.json are read; `auto_map` and other references to code are never followed.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from attnzoo.attention import PLUGINS_VARIABLE
from attnzoo.checkpoint.base import Checkpoint
from attnzoo.checkpoint.families import DEFAULTS, FamilyConfig
from attnzoo.checkpoint.names import HUGGING_FACE, rename
from attnzoo.checkpoint.shards import Shards
from attnzoo.checkpoint.sources import warn_of_changes
from attnzoo.models import DecoderConfig

FAMILIES = tuple(DEFAULTS)
OWN = "attnzoo"
"""The model type of `attnzoo.hf`: config.json has our configuration under "decoder"; tensors have our names after
"model."."""


def read_config(content: Mapping[str, Any], path: Path) -> DecoderConfig:
    """The configuration in a config.json, of a family or of our own type. Raises ValueError naming file and key."""
    family = content.get("model_type")
    if family == OWN:
        return _own_config(content, path)
    if family == "llava":
        raise ValueError(f"{path}: model_type='llava' reads pictures; load it with attnzoo.checkpoint.load_llava")
    if family not in FAMILIES:
        raise ValueError(f"{path}: model_type={family!r} is not supported; known: {', '.join(FAMILIES)}, {OWN}")
    try:
        return FamilyConfig.read(content).decoder()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _own_config(content: Mapping[str, Any], path: Path) -> DecoderConfig:
    decoder = content.get("decoder")
    if not isinstance(decoder, dict):
        raise ValueError(f"{path}: decoder is a {type(decoder).__name__}, not a model; export it again")
    try:
        return DecoderConfig.from_dict(decoder)
    except ValueError as error:
        way_out = "" if PLUGINS_VARIABLE in str(error) else "; export the model again"
        raise ValueError(f"{path}: decoder: {error}{way_out}") from None


def open_directory(directory: Path, content: Mapping[str, Any], config_path: Path) -> Checkpoint:
    """The model in a directory of transformers, whose config.json is `content`. Raises ValueError naming the file."""
    own_type = content["model_type"] == OWN
    config, shards = read_config(content, config_path), Shards.of(directory, integers=own_type)
    if own_type:
        warn_of_changes(content.get("plugins"), directory)

    def name(own: str) -> str:
        return f"model.{own}" if own_type else rename(own, HUGGING_FACE)

    head = name("head.weight")
    if config.tie_embeddings and head in shards.shapes:
        # transformers does not tie weights that differ in the file.
        config = replace(config, tie_embeddings=shards.same(head, name("embedding.weight")))
    tied = config.tie_embeddings
    return Checkpoint(
        path=directory,
        config=config,
        shapes=shards.shapes,
        read=shards.read,
        dtypes=shards.dtypes,
        name=name,
        # Older files hold the rotary frequencies, and some hold a copy of a tied head.
        ignored=lambda found: found.endswith("rotary_emb.inv_freq") or (tied and found == head),
    )
