"""The project's own format: model.safetensors, config.json and the tokenizer in one directory, written atomically.

No optimiser state and no pickle: loading cannot run code. A reader sees the old or the new directory, never half of
one.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.parameter import is_lazy

from attnzoo.attention import PLUGINS_VARIABLE
from attnzoo.checkpoint.base import Checkpoint
from attnzoo.checkpoint.shards import DTYPES, INTEGERS, WEIGHTS, Shards
from attnzoo.checkpoint.sources import plugin_sources, warn_of_changes
from attnzoo.checkpoint.target import check_native_target
from attnzoo.errors import suggest
from attnzoo.files import real_path, replace_directory, temporary_directory
from attnzoo.models import DecoderConfig, DecoderLM

if TYPE_CHECKING:
    from attnzoo.tokenizer import Tokenizer

CONFIG = "config.json"
FORMAT = "attnzoo-decoder-1"
KEYS = ("format", "model", "metadata", "plugins")
"""Keys of config.json. plugins: `attnzoo.checkpoint.sources.plugin_sources`, if there are any."""
TOKENIZER = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files that tokenizers save."""


def check_target(directory: Path) -> None:
    """Raises ValueError, naming what would be lost, unless `save_model` may write to `directory`."""
    check_native_target(Path(directory), config=CONFIG, format=FORMAT, names=(CONFIG, WEIGHTS, *TOKENIZER))


def save_model(
    directory: Path,
    model: DecoderLM,
    *,
    tokenizer: "Tokenizer | None" = None,
    metadata: dict[str, Any] | None = None,
) -> Path:
    """Writes `model` to `directory`, replacing an earlier model of this format; returns the directory.

    `tokenizer` is saved along; `metadata` is any JSON (loss, steps, provenance). Raises ValueError for a directory that
    holds anything else.
    """
    directory = real_path(directory)
    check_target(directory)
    temporary = temporary_directory(directory)
    try:
        tensors = saved_tensors(model)
        save_file(tensors, str(temporary / WEIGHTS))
        content = {"format": FORMAT, "model": model.config.to_dict(), "metadata": metadata or {}}
        content |= {"plugins": sources} if (sources := plugin_sources(model)) else {}
        (temporary / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(temporary)
        replace_directory(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def saved_tensors(model: DecoderLM) -> dict[str, Tensor]:
    """The model's `state_dict` without a tied head, on the CPU; tensors share no memory, which safetensors refuses.
    Raises ValueError as `check_saveable`."""
    check_saveable(model)
    tensors: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in model.state_dict().items():
        if model.config.tie_embeddings and name == "head.weight":
            continue
        flat = tensor.detach().contiguous().cpu()
        tensors[name] = flat.clone() if flat.untyped_storage().data_ptr() in taken else flat
        taken.add(flat.untyped_storage().data_ptr())
    return tensors


def check_saveable(model: DecoderLM) -> None:
    """Raises ValueError, naming a tensor that a checkpoint cannot hold. Call it before training, not after."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{name} is a {type(tensor).__name__}, and a checkpoint holds tensors alone; keep it as a buffer or in "
                "the configuration"
            )
        if is_lazy(tensor):
            raise ValueError(f"{name} has no shape yet; make it of its final shape in __init__")
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise ValueError(f"{name} has layout {tensor.layout}, which cannot be saved; keep it as a dense tensor")
        if tensor.is_meta and not _is_shape(model):
            raise ValueError(f"{name} is on the meta device and has no values to save")
        if tensor.dtype not in (*DTYPES.values(), *INTEGERS.values()):
            raise ValueError(
                f"{name} has dtype {tensor.dtype}, which cannot be saved; keep it as real numbers, or register it with "
                "persistent=False where it follows from the configuration"
            )


def _is_shape(model: DecoderLM) -> bool:
    """Whether the model was built to be sized (`build_shapes`): then no tensor has values."""
    return model.embedding.weight.is_meta


def open_directory(directory: Path, content: Mapping[str, Any], config_path: Path) -> Checkpoint:
    """The model in a directory of our own format, whose config.json is `content`. Raises ValueError naming the file."""
    for key in content:
        if key not in KEYS:
            raise ValueError(f"{config_path}: unknown key {key}{suggest(key, KEYS)}; export the model again")
    model, metadata = content.get("model"), content.get("metadata", {})
    for name, section in (("model", model), ("metadata", metadata)):
        if not isinstance(section, Mapping):
            raise ValueError(f"{config_path}: {name} is a {type(section).__name__}, not an object; export it again")
    assert isinstance(model, Mapping)
    try:
        config = DecoderConfig.from_dict(model)
    except ValueError as error:
        # If the variant is missing, the file is not at fault.
        way_out = "" if PLUGINS_VARIABLE in str(error) else "; export the model again"
        raise ValueError(f"{config_path}: {error}{way_out}") from None
    warn_of_changes(content.get("plugins"), directory)
    shards = Shards.of(directory, integers=True)
    return Checkpoint(
        path=directory,
        config=config,
        shapes=shards.shapes,
        read=shards.read,
        dtypes=shards.dtypes,
        metadata=dict(metadata),
    )
