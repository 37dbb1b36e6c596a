"""The project's own format: model.safetensors, config.json and the tokenizer in one directory, written atomically.

No optimiser state and no pickle: what is loaded cannot run code. A reader sees the old directory or the new one,
never half of one.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from attnzoo.attention import PLUGINS_VARIABLE
from attnzoo.checkpoint.base import Checkpoint
from attnzoo.checkpoint.shards import DTYPES, INTEGERS, WEIGHTS, Shards
from attnzoo.checkpoint.target import check_native_target
from attnzoo.files import real_path, replace_directory, temporary_directory
from attnzoo.models import DecoderConfig, DecoderLM

if TYPE_CHECKING:
    from attnzoo.tokenizer import Tokenizer

CONFIG = "config.json"
FORMAT = "attnzoo-decoder-1"
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
        (temporary / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(temporary)
        replace_directory(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def saved_tensors(model: DecoderLM) -> dict[str, Tensor]:
    """Everything in the model's `state_dict` but a tied head, on the CPU; every tensor in memory of its own, which
    safetensors asks for. Raises ValueError, naming the tensor, for a dtype that the format does not have."""
    tensors: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in model.state_dict().items():
        if model.config.tie_embeddings and name == "head.weight":
            continue
        if tensor.dtype not in (*DTYPES.values(), *INTEGERS.values()):
            raise ValueError(
                f"{name} has dtype {tensor.dtype}, which cannot be saved; keep it as real numbers, or register it with "
                "persistent=False where it follows from the configuration"
            )
        flat = tensor.detach().contiguous().cpu()
        tensors[name] = flat.clone() if flat.untyped_storage().data_ptr() in taken else flat
        taken.add(flat.untyped_storage().data_ptr())
    return tensors


def open_directory(directory: Path, content: Mapping[str, Any], config_path: Path) -> Checkpoint:
    """The model in a directory of our own, `content` being its config.json. Raises ValueError naming the file."""
    model, metadata = content.get("model"), content.get("metadata") or {}
    for name, section in (("model", model), ("metadata", metadata)):
        if not isinstance(section, Mapping):
            raise ValueError(f"{config_path}: {name} is a {type(section).__name__}, not an object; export it again")
    assert isinstance(model, Mapping)
    try:
        config = DecoderConfig.from_dict(model)
    except ValueError as error:
        # A variant that is not there is no fault of the file.
        way_out = "" if PLUGINS_VARIABLE in str(error) else "; export the model again"
        raise ValueError(f"{config_path}: {error}{way_out}") from None
    shards = Shards.of(directory, integers=True)
    return Checkpoint(
        path=directory,
        config=config,
        shapes=shards.shapes,
        read=shards.read,
        dtype=shards.main_dtype(),
        metadata=dict(metadata),
    )
