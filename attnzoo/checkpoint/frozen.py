"""A language model that others read through: named in files by its checkpoint and a digest of its weights."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from attnzoo.checkpoint.load import load_model, load_tokenizer
from attnzoo.checkpoint.packaged import existing_checkpoint
from attnzoo.models import DecoderLM
from attnzoo.types import parse_dtype

if TYPE_CHECKING:
    from attnzoo.tokenizer import Tokenizer


@dataclass(frozen=True)
class FrozenLM:
    """A language model with its tokenizer. checkpoint: where it was found; dtype: of its weights."""

    model: DecoderLM
    tokenizer: "Tokenizer"
    checkpoint: str
    dtype: str

    @classmethod
    def load(cls, checkpoint: str, dtype: str = "float32") -> "FrozenLM":
        """As `attnzoo.load` finds it. Raises ValueError."""
        path, kind = existing_checkpoint(checkpoint), parse_dtype(dtype)
        tokenizer = load_tokenizer(path)
        return cls(load_model(path, dtype=kind), tokenizer, checkpoint, dtype)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights and the tokenizer."""
        found = hashlib.sha256(self.tokenizer.fingerprint().encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            found.update(name.encode())
            found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """What names it in files."""
        return {"checkpoint": self.checkpoint, "dtype": self.dtype, "digest": self.digest}
