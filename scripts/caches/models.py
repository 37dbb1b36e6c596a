"""Loads the models for measuring caches, and the prose that they read."""

import pydoc_data.topics
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.checkpoint import find_checkpoint, load_model, load_tokenizer
from attnzoo.models import DecoderConfig, DecoderLM
from attnzoo.tasks.examples import Ids
from attnzoo.tasks.text import Encode


@dataclass(frozen=True)
class TextModel:
    """A model, its encoder, and the tokens at the beginning of its texts."""

    model: DecoderLM
    encode: Encode
    begin: Ids = ()


def load_text_model(checkpoint: str, dtype: torch.dtype = torch.float32) -> TextModel:
    """The model and tokenizer of a checkpoint. Raises ValueError if they cannot be read."""
    path = find_checkpoint(checkpoint)
    tokenizer = load_tokenizer(path)
    return TextModel(load_model(path, dtype=dtype), tokenizer.encode, tuple(tokenizer.encode("", bos=True)))


def random_reader(attention: str = "mha") -> TextModel:
    """A tiny model with random weights whose tokens are bytes, for --quick and tests."""
    torch.manual_seed(0)
    options = {"kind": attention, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    config = DecoderConfig(vocab_size=256, model_dim=32, num_layers=2, attention=options, max_positions=1024)
    return TextModel(DecoderLM(config).eval().requires_grad_(False), lambda text: list(text.encode("utf-8")))


def prose(encode: Encode, texts: int, length: int) -> Tensor:
    """tokens_NT of Python's built-in documentation (its topics in order of their names, concatenated): English with
    code that every Python has. Raises ValueError if it is too short."""
    topics: dict[str, str] = pydoc_data.topics.topics
    tokens: list[int] = []
    for name in sorted(topics):
        tokens += encode(topics[name])
        if len(tokens) >= texts * length:
            return torch.tensor(tokens[: texts * length]).view(texts, length)
    raise ValueError(f"texts={texts} of {length} tokens are more than Python's documentation has; ask for fewer")
