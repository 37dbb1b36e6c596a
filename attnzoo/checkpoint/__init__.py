"""Models on disk: our own format, directories of transformers (read and written), GGUF files.

Nothing read here is executed.
"""

from attnzoo.checkpoint.base import Checkpoint
from attnzoo.checkpoint.huggingface_export import export_model
from attnzoo.checkpoint.llava import load_llava
from attnzoo.checkpoint.load import load_model, load_tokenizer, open_checkpoint, read_metadata
from attnzoo.checkpoint.native import CONFIG, save_model
from attnzoo.checkpoint.packaged import PACKAGED, existing_checkpoint, find_checkpoint

__all__ = [
    "CONFIG",
    "PACKAGED",
    "Checkpoint",
    "existing_checkpoint",
    "export_model",
    "find_checkpoint",
    "load_llava",
    "load_model",
    "load_tokenizer",
    "open_checkpoint",
    "read_metadata",
    "save_model",
]
