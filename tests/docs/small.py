"""What hidden blocks of the documents call."""

from pathlib import Path

from attnzoo.checkpoint import save_model
from tests.helpers import serving


def small_checkpoint(directory: str) -> Path:
    """A small model with random weights where a page speaks of a trained one."""
    return save_model(Path(directory), serving.small_model("rcmha"), tokenizer=serving.tokenizer())
