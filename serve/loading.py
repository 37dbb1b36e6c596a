"""The engine's model and tokenizer, and what they allow."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from attnzoo.checkpoint import load_model, load_tokenizer
from attnzoo.models import DecoderLM, can_pack, pack_weights
from attnzoo.types import parse_dtype
from serve.config import EngineConfig

if TYPE_CHECKING:
    from attnzoo.tokenizer import Tokenizer


def load_parts(
    directory: Path, config: EngineConfig, model: DecoderLM | None, tokenizer: "Tokenizer | None"
) -> tuple[DecoderLM, "Tokenizer"]:
    """Model and tokenizer, read from the checkpoint where they are None. Raises ValueError where one is damaged, or
    they do not fit each other."""
    if model is None:
        check_device(config.device)
        model = _load(directory, config)
    tokenizer = tokenizer or load_tokenizer(directory)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{directory}: the tokenizer knows {tokenizer.vocab_size} tokens, the model only "
            f"{model.config.vocab_size}; export the model with its own tokenizer"
        )
    return model, tokenizer


def max_model_len(config: EngineConfig, model: DecoderLM) -> int:
    """Tokens of a sequence at most. Raises ValueError for more than the model can read."""
    most = model.config.max_positions
    length = most if config.max_model_len is None else config.max_model_len
    if length > most:
        raise ValueError(
            f"max_model_len={length} is more than the model's max_positions={most}: it was made for positions below "
            f"that, and what it writes beyond them is noise; set max_model_len to {most} or less, or leave it out"
        )
    if length < 2:
        raise ValueError(f"max_model_len={length} leaves no room for a prompt and a token")
    return length


def check_device(name: str) -> None:
    """Raises ValueError that names `device` where nothing can be computed there."""
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise ValueError(f"device={name!r} has no memory; give cpu or cuda")
        torch.zeros(1, device=device).add(1).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device={name!r} cannot be used on this machine ({reason}); give cpu, or a GPU it has"
        ) from None


def _load(path: Path, config: EngineConfig) -> DecoderLM:
    dtype = None if config.dtype is None else parse_dtype(config.dtype)
    model = load_model(path, device=config.device, dtype=dtype, check_finite=config.check_weights)
    if config.pack_weights or (config.pack_weights is None and can_pack(model)):
        pack_weights(model)
    return model
