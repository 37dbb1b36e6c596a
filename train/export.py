"""From a run to what a server loads, and from an export to the start of another run."""

import hashlib
from pathlib import Path
from typing import Any

from attnzoo.checkpoint import TOKENIZER, load_model, save_model
from attnzoo.models import DecoderLM
from train.engine import Engine


def export(engine: Engine, directory: Path, tokenizer: Path, metadata: dict[str, Any]) -> None:
    """Writes weights (float32, gathered from all ranks), config.json and tokenizer.model; called by every rank."""
    model = engine.full_model()
    if model is not None:
        save_model(directory, model, tokenizer=tokenizer, metadata=metadata)
    engine.barrier()


def init_from(model: DecoderLM, directory: Path, tokenizer: Path) -> None:
    """Copies the weights of an export into a new model.

    Raises ValueError that names the field when its model or tokenizer is not the one of this run.
    """
    source = load_model(directory)
    theirs, mine = source.config.to_dict(), model.config.to_dict()
    for key in mine:
        if theirs.get(key) != mine[key]:
            raise ValueError(
                f"checkpoint.init_from={directory} has model.{key}={theirs.get(key)!r} and this run has {mine[key]!r}; "
                "set it to the export's"
            )
    saved = directory / TOKENIZER
    if saved.is_file() and file_hash(saved) != file_hash(tokenizer):
        raise ValueError(
            f"checkpoint.init_from={directory} was trained with another tokenizer; set tokenizer.path={saved}"
        )
    model.load_state_dict(source.state_dict())


def file_hash(path: Path) -> str:
    """The beginning of the SHA-256 of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
