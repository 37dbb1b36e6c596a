"""GGUF files of the architecture "llama", dequantised on loading.

Rotary positions of this format rotate neighbouring channels (2c, 2c + 1), ours rotate (c, c + H/2), so rows of W_q and
W_k are reordered. Quantisation works along rows and is not affected.
"""

import importlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnzoo.checkpoint.base import Checkpoint, Piece
from attnzoo.checkpoint.names import GGUF, rename
from attnzoo.gguf_file import GGUFFile, GGUFTensor, read_gguf
from attnzoo.models import DecoderConfig

PIECE = 1 << 21
"""Elements that are dequantised at a time."""
FREQUENCIES = "rope_freqs.weight"
UNSUPPORTED: Mapping[str, Any] = {
    "expert_count": 0,
    "use_parallel_residual": False,
    "attention.causal": True,
    "attention.max_alibi_bias": 0.0,
    "attention.clamp_kqv": 0.0,
    "attention.scale": 0.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "logit_scale": 0.0,
    "residual_scale": 0.0,
    "embedding_scale": 0.0,
    "rope.scaling.attn_factor": 1.0,
}
"""Fields that change the function, with the value that leaves it unchanged. Other values are refused."""
LLAMA3_FACTORS = (8.0, 32.0)
"""Scaling factors of Llama 3.1 and 3.2. Files hold the divisor of each frequency instead of the rule."""


@dataclass(frozen=True)
class _ModelFields:
    """The metadata under "llama.", with errors that name file and field."""

    file: GGUFFile

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        value = self.file.metadata.get(f"llama.{name}", default)
        if value is None:
            raise ValueError(f"{self.file.path}: llama.{name} is missing; convert the model again")
        if type(value) is not kind:
            raise ValueError(f"{self.file.path}: llama.{name}={value!r} is not supported; it must be {kind.__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{self.file.path}: llama.{name}={value} is not finite; convert the model again")
        return value

    def size(self, name: str, default: int | None = None) -> int:
        value: int = self.get(name, int, default)
        if value < 1:
            raise ValueError(f"{self.file.path}: llama.{name}={value} must be at least 1; convert the model again")
        return value

    def optional_size(self, name: str) -> int | None:
        return self.size(name) if f"llama.{name}" in self.file.metadata else None


def open_file(path: Path) -> Checkpoint:
    """The model in a GGUF file. Raises ValueError naming the file, and the field or tensor that is not supported."""
    file = read_gguf(path)
    package = _package()
    ends = {name: _check_kind(file, name, tensor, package) for name, tensor in file.tensors.items()}
    _check_layout(file, ends)
    config = _config(file)
    heads = config.layer_attention(0)[1]

    def read() -> Iterator[Piece]:
        for name, tensor in file.tensors.items():
            if name == FREQUENCIES:
                continue
            count = {"attn_q": heads["num_heads"], "attn_k": heads["num_kv_heads"]}.get(name.split(".")[-2])
            rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
            step = rows if count is not None else max(1, PIECE * rows // max(tensor.size, 1))
            for first in range(0, rows, step):
                piece = _dequantise(file, tensor, first, min(first + step, rows), package)
                if count is not None:
                    piece = piece.unflatten(0, (count, -1, 2)).transpose(1, 2).flatten(0, 2)
                yield name, first, piece.reshape(-1) if len(tensor.shape) == 1 else piece

    return Checkpoint(
        path=path,
        config=config,
        shapes={name: tensor.shape for name, tensor in file.tensors.items()},
        read=read,
        dtypes=dict.fromkeys(file.tensors, torch.float32),
        name=lambda own: rename(own, GGUF),
        ignored=lambda name: name == FREQUENCIES,
        metadata={key: value for key, value in file.metadata.items() if key.startswith("general.")},
    )


def _config(file: GGUFFile) -> DecoderConfig:
    architecture = file.metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{file.path}: general.architecture={architecture!r} is not supported; known: llama")
    fields = _ModelFields(file)
    for name, neutral in UNSUPPORTED.items():
        value = file.metadata.get(f"llama.{name}", neutral)
        if value != neutral:
            raise ValueError(f"{file.path}: llama.{name}={value!r} is not supported")
    dim, heads = fields.size("embedding_length"), fields.size("attention.head_count")
    head_dim = fields.size("attention.key_length", dim // heads)
    for name, value in (("rope.dimension_count", head_dim), ("attention.value_length", head_dim)):
        if fields.get(name, int, value) != value:
            raise ValueError(
                f"{file.path}: llama.{name}={fields.get(name, int)} differs from the head's {value}; not supported"
            )
    theta = fields.get("rope.freq_base", float, 10000.0)
    if theta <= 0:
        raise ValueError(f"{file.path}: llama.rope.freq_base={theta} must be positive; convert the model again")
    vocabulary = file.tensors.get("token_embd.weight")
    attention = {
        "kind": "mha",
        "num_heads": heads,
        "num_kv_heads": fields.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rope_theta": theta,
        "rope_scaling": _scaling(file, fields, theta, head_dim // 2),
        "window": fields.optional_size("attention.sliding_window"),
    }
    sizes = {
        "vocab_size": vocabulary.shape[0] if vocabulary else fields.get("vocab_size", int),
        "num_layers": fields.get("block_count", int),
        "max_positions": fields.get("context_length", int),
        "mlp_dim": fields.get("feed_forward_length", int),
    }
    epsilon, tied = fields.get("attention.layer_norm_rms_epsilon", float), "output.weight" not in file.tensors
    try:
        return DecoderConfig(**sizes, model_dim=dim, attention=attention, norm_eps=epsilon, tie_embeddings=tied)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None


def _scaling(file: GGUFFile, fields: _ModelFields, theta: float, half: int) -> dict[str, Any] | None:
    """Options of `RopeScaling`, by llama.cpp's rules; Llama 3's rule is inferred from the divisors in the file.

    A factor without a type is linear, and "rope.scale_linear" is its older name; 0 and 1 change nothing.
    """
    kind = fields.get("rope.scaling.type", str, "linear")
    if kind not in ("none", "linear"):
        raise ValueError(f"{file.path}: llama.rope.scaling.type={kind!r} is not supported; known: none, linear")
    factor = fields.get("rope.scaling.factor", float, fields.get("rope.scale_linear", float, 0.0))
    linear = {"kind": "linear", "factor": factor} if kind == "linear" and factor not in (0.0, 1.0) else None
    divided = _divided(file, theta, half)
    if linear is not None and divided is not None:
        raise ValueError(f"{file.path}: llama.rope.scaling.factor={factor} together with {FREQUENCIES}: not supported")
    return linear or divided


def _divided(file: GGUFFile, theta: float, half: int) -> dict[str, Any] | None:
    """The rule that gives the divisors in the file; None where there are none, or all are 1."""
    if FREQUENCIES not in file.tensors:
        return None
    from attnzoo.ops.rope.scaling import RopeScaling, frequencies

    found = _dequantise(file, file.tensors[FREQUENCIES], 0, 1, _package()).flatten().double()
    if bool((found == 1).all()):
        return None
    plain = frequencies(half, theta, None, like=found)
    for factor in LLAMA3_FACTORS:
        options = {"kind": "llama3", "factor": factor, "original_max_positions": 8192}
        expected = plain / frequencies(half, theta, RopeScaling.of(options), like=found)
        if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4):
            return options
    raise ValueError(f"{file.path}: {FREQUENCIES} follows no rule known here (Llama 3.1 and 3.2 are); not supported")


def _package() -> ModuleType:
    try:
        return importlib.import_module("gguf")
    except ModuleNotFoundError:
        raise ValueError("reading GGUF files needs the package gguf: pip install 'attnzoo[weights]'") from None


def _check_kind(file: GGUFFile, name: str, tensor: GGUFTensor, package: ModuleType) -> int:
    """The byte where a tensor's data end. Raises ValueError for a quantisation that the package does not know, or a
    tensor beyond the end of the file."""
    where = f"{file.path}: tensor {name}"
    try:
        block, width = package.GGML_QUANT_SIZES[package.GGMLQuantizationType(tensor.kind)]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{where} is of a type that is not known ({error}); convert the model again") from None
    if not tensor.size or not tensor.shape or tensor.shape[-1] % block:
        raise ValueError(
            f"{where} has shape {list(tensor.shape)}, not whole blocks of {block}; convert the model again"
        )
    end = tensor.offset + tensor.size // block * width
    if end > file.path.stat().st_size:
        raise ValueError(f"{where} reaches past the end of the file; copy it again")
    try:
        _dequantise(file, tensor, 0, 1, package)
    except (NotImplementedError, KeyError) as error:
        raise ValueError(f"{where} cannot be dequantised ({error}); convert the model to another type") from None
    return end


def _check_layout(file: GGUFFile, ends: Mapping[str, int]) -> None:
    """Raises ValueError unless the tensors' data follow one another without gaps, as every writer stores them: that
    reveals a damaged type, shape or offset. ends: the byte where each tensor's data end."""
    expected = file.data
    for name, tensor in sorted(file.tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset != expected:
            raise ValueError(
                f"{file.path}: tensor {name} begins at byte {tensor.offset}, and what stands before it ends at "
                f"{expected}: an offset, a type or a shape is damaged; download it again"
            )
        expected = -(-ends[name] // file.alignment) * file.alignment


def _dequantise(file: GGUFFile, tensor: GGUFTensor, first: int, end: int, package: ModuleType) -> Tensor:
    """Rows `first` to `end` - 1 in float32; a vector is one row."""
    kind = package.GGMLQuantizationType(tensor.kind)
    block, width = package.GGML_QUANT_SIZES[kind]
    row_bytes = tensor.shape[-1] // block * width
    data = np.fromfile(
        file.path, dtype=np.uint8, count=(end - first) * row_bytes, offset=tensor.offset + first * row_bytes
    )
    with np.errstate(all="ignore"):  # loading reports tensors that are not finite by name
        rows = package.quants.dequantize(data.reshape(end - first, row_bytes), kind)
    return torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32))
