"""Loads a model from files of any supported format."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attnzoo.checkpoint import finite, gguf, huggingface, native
from attnzoo.checkpoint.base import Checkpoint, check_shapes, main_dtype
from attnzoo.checkpoint.native import CONFIG, FORMAT
from attnzoo.files import read_object
from attnzoo.models import DecoderLM, buffer_dtype, build_shapes, materialise

if TYPE_CHECKING:
    from attnzoo.tokenizer import Tokenizer


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a checkpoint without reading its weights.

    `path`: a directory written by training (its export/) or by transformers, or a .gguf file. Raises ValueError that
    names the file and what is wrong with it.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return gguf.open_file(path)
    if os.path.isfile(path):  # unlike Path.is_file, without an error for names that are too long
        near = f" (its directory, {path.parent}, looks like one)" if (path.parent / CONFIG).is_file() else ""
        raise ValueError(f"'{path}' is a file; a checkpoint is a directory{near}, or a file whose name ends in .gguf")
    config_path = path / CONFIG
    try:
        content = read_object(config_path)
    except FileNotFoundError:
        raise ValueError(
            f"{config_path} does not exist; give a directory written by training (its export/) or by transformers, or "
            "a .gguf file"
        ) from None
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

    dtype: of the weights. None keeps the dtype that most of them are stored in, and that of every buffer; quantised
    weights become float32. Raises ValueError that names the file and the tensors that are missing, unexpected or of
    another shape, or (unless `check_finite` is False) hold NaN or infinity.
    """
    return read_model(open_checkpoint(path), device=device, dtype=dtype, check_finite=check_finite)


def read_model(
    checkpoint: Checkpoint,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    check_finite: bool = True,
) -> DecoderLM:
    """As `load_model`, of a checkpoint that is open."""
    tied = checkpoint.config.tie_embeddings
    model = _frame(checkpoint)
    own = {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "head.weight")}
    theirs = {checkpoint.name(name): name for name in own}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found = {name: shape for name, shape in checkpoint.shapes.items() if not checkpoint.ignored(name)}
    check_shapes(checkpoint.path, found, {name: tuple(own[theirs[name]].shape) for name in theirs})
    main = dtype or main_dtype(checkpoint, (checkpoint.name(name) for name in own if name in parameters))
    # Always copies: what is read is a view of a file, which may change or be deleted.
    weights = {}
    for name, tensor in own.items():
        wanted = main if name in parameters else buffer_dtype(checkpoint.dtypes[checkpoint.name(name)], dtype)
        kept = tensor.is_floating_point() and wanted.is_floating_point  # otherwise it is refused below, or not a weight
        weights[name] = torch.empty_like(tensor, device=device, dtype=wanted if kept else None)
    for name, first, rows in checkpoint.read():
        if not checkpoint.ignored(name):
            target = weights[theirs[name]]
            if target.dtype != rows.dtype and not (target.is_floating_point() and rows.is_floating_point()):
                raise ValueError(f"{checkpoint.path}: tensor {name} is {rows.dtype}, and the model's is {target.dtype}")
            target = target[first : first + len(rows)] if target.dim() else target
            target.copy_(rows)
            if check_finite and theirs[name] in parameters:  # a buffer may well hold -inf, as a mask does
                finite.check_finite(checkpoint.path, name, first, rows, target)
    try:
        materialise(model, weights, device, None if dtype is None and main == torch.float32 else main)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from None
    return model.eval().requires_grad_(False)


def _frame(checkpoint: Checkpoint) -> DecoderLM:
    """The model without weights. Raises ValueError for a configuration too large for its files or any model."""
    config = checkpoint.config
    if config.num_layers > len(checkpoint.shapes):
        raise ValueError(
            f"{checkpoint.path}: the tensors do not fit the configuration; num_layers={config.num_layers}, and there "
            f"are {len(checkpoint.shapes)} tensors. Is it complete, and are configuration and weights of one model?"
        )
    try:
        return build_shapes(config)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from None


def load_tokenizer(path: Path) -> "Tokenizer":
    """The tokenizer of a checkpoint; `path` as in `open_checkpoint`. Raises ValueError when there is none."""
    from attnzoo import tokenizer

    return tokenizer.load_tokenizer(Path(path))


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata given to `save_model`, or the "general." fields of a GGUF file; empty for transformers."""
    return open_checkpoint(path).metadata


def check_fit(model: DecoderLM, tokenizer: "Tokenizer", where: str) -> None:
    """Raises ValueError, beginning with `where`, for a tokenizer that knows more tokens than the model."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{where}: the tokenizer knows {tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}; "
            "export the model with its own tokenizer"
        )
