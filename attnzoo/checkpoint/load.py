"""From files to a model, whatever format they are in."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attnzoo.checkpoint import finite, gguf, huggingface, native
from attnzoo.checkpoint.base import Checkpoint, check_shapes
from attnzoo.checkpoint.native import CONFIG, FORMAT
from attnzoo.models import DecoderLM, build_shapes

if TYPE_CHECKING:
    from attnzoo.tokenizer import Tokenizer


def open_checkpoint(path: Path) -> Checkpoint:
    """Looks at a checkpoint without reading its weights.

    `path`: a directory written by training (its export/) or by transformers, or a .gguf file. Raises ValueError that
    names the file and what is wrong with it.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return gguf.open_file(path)
    config_path = path / CONFIG
    try:
        content = json.loads(config_path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{config_path} does not exist; give a directory written by training (its export/) or by transformers, or "
            "a .gguf file"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{config_path} is not JSON ({error}); export the model again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{config_path} holds a {type(content).__name__}, not a configuration; export the model again")
    if "model_type" in content:
        return huggingface.open_directory(path, content, config_path)
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{config_path}: format={content.get('format')!r} is not {FORMAT!r}, and there is no model_type; export "
            "the model with this version"
        )
    return native.open_directory(path, content, config_path)


def load_model(
    path: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    check_finite: bool = True,
) -> DecoderLM:
    """Reads a model in evaluation mode, one tensor at a time; `path` as in `open_checkpoint`.

    `dtype` None keeps the one most weights are stored in; quantised ones become float32. Raises ValueError that names
    the file and the tensors that are missing, unexpected or of another shape, or (unless `check_finite` is False) hold
    NaN or infinity.
    """
    checkpoint = open_checkpoint(path)
    tied = checkpoint.config.tie_embeddings
    model = build_shapes(checkpoint.config)
    own = {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "head.weight")}
    theirs = {checkpoint.name(name): name for name in own}
    found = {name: shape for name, shape in checkpoint.shapes.items() if not checkpoint.ignored(name)}
    check_shapes(checkpoint.path, found, {name: tuple(own[theirs[name]].shape) for name in theirs})
    dtype = dtype or checkpoint.dtype
    # Copies in any case: what is read is a view of a file, which may change or go.
    weights = {name: torch.empty_like(tensor, device=device, dtype=dtype) for name, tensor in own.items()}
    for name, first, rows in checkpoint.read():
        if not checkpoint.ignored(name):
            target = weights[theirs[name]][first : first + len(rows)]
            target.copy_(rows)
            if check_finite:
                finite.check_finite(checkpoint.path, name, first, rows, target)
    if tied:
        weights["head.weight"] = weights["embedding.weight"]
    model.load_state_dict(weights, assign=True)
    if tied:
        model.head.weight = model.embedding.weight
    return model.eval().requires_grad_(False)


def load_tokenizer(path: Path) -> "Tokenizer":
    """The tokenizer of a checkpoint; `path` as in `open_checkpoint`. Raises ValueError when there is none."""
    from attnzoo import tokenizer

    return tokenizer.load_tokenizer(Path(path))


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata given to `save_model`; empty for formats that have none."""
    return open_checkpoint(path).metadata
