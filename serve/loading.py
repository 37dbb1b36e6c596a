"""Loads the engine's model and tokenizer, and determines the longest sequence."""

from pathlib import Path
from typing import TYPE_CHECKING

from attnzoo.checkpoint import load_tokenizer
from attnzoo.checkpoint.load import check_fit
from attnzoo.loading import load_for_inference
from attnzoo.models import DecoderLM
from attnzoo.types import parse_dtype
from serve.config import EngineConfig

if TYPE_CHECKING:
    from attnzoo.tokenizer import Tokenizer


def load_parts(
    directory: Path, config: EngineConfig, model: DecoderLM | None, tokenizer: "Tokenizer | None"
) -> tuple[DecoderLM, "Tokenizer"]:
    """The model and the tokenizer; those that are None are read from the checkpoint. Raises ValueError if a file is
    damaged, or the tokenizer has more tokens than the model."""
    if model is None:
        model = load_for_inference(
            directory,
            device=config.device,
            dtype=None if config.dtype is None else parse_dtype(config.dtype),
            check_finite=config.check_weights,
            pack=config.pack_weights,
        )
    tokenizer = tokenizer or load_tokenizer(directory)
    check_fit(model, tokenizer, str(directory))
    return model, tokenizer


def max_model_len(config: EngineConfig, most: int) -> int:
    """The most tokens of a sequence. most: the model's max_positions. Raises ValueError if config.max_model_len exceeds
    it."""
    length = most if config.max_model_len is None else config.max_model_len
    if length > most:
        raise ValueError(
            f"max_model_len={length} is more than the model's max_positions={most}: it was made for positions below "
            f"that, and what it writes beyond them is noise; set max_model_len to {most} or less, or leave it out"
        )
    if length < 2:
        raise ValueError(f"max_model_len={length} leaves no room for a prompt and a token")
    return length
