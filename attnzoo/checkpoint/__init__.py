"""Models on disk: our own format, directories of transformers, GGUF files. Nothing read here is executed."""

from attnzoo.checkpoint.base import Checkpoint
from attnzoo.checkpoint.load import load_model, load_tokenizer, open_checkpoint, read_metadata
from attnzoo.checkpoint.native import CONFIG, save_model
from attnzoo.checkpoint.packaged import PACKAGED, find_checkpoint

__all__ = [
    "CONFIG",
    "PACKAGED",
    "Checkpoint",
    "find_checkpoint",
    "load_model",
    "load_tokenizer",
    "open_checkpoint",
    "read_metadata",
    "save_model",
]
