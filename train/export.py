"""From a run to what a server loads, and from an export to the start of another run."""

from pathlib import Path
from typing import Any

from attnzoo.checkpoint import find_checkpoint, load_model, load_tokenizer, open_checkpoint, save_model
from attnzoo.checkpoint.native import check_target
from attnzoo.models import DecoderConfig, DecoderLM
from attnzoo.tokenizer import Tokenizer
from train.engine import TrainingEngine
from train.failures import TrainingError
from train.finite import first_non_finite
from train.ranks import agree


def export(engine: TrainingEngine, directory: Path, tokenizer: Tokenizer, metadata: dict[str, Any]) -> None:
    """Writes weights (float32, gathered from all ranks, adapters merged), config.json and the tokenizer.

    Called by every rank. An export that is there is replaced only by one that is finite and whole.
    """
    model = engine.full_model()

    def write() -> None:
        if model is None:
            return
        # Parameters: a buffer may well hold -inf, as a mask does.
        name = first_non_finite(model.named_parameters())
        if name is not None:
            raise TrainingError(f"{name} is not finite: {directory} is not written")
        save_model(directory, model, tokenizer=tokenizer, metadata=metadata)

    agree(write)


def check_export(directory: Path) -> None:
    """Raises ValueError, before anything is trained, for a directory that the export would not replace."""
    try:
        check_target(directory)
    except ValueError as error:
        raise ValueError(f"run_dir: {error}") from None


def init_from(model: DecoderLM, checkpoint: str, tokenizer: Tokenizer) -> None:
    """Copies the weights of a checkpoint into a new model.

    Raises ValueError that names the field when its model or tokenizer is not the one of this run.
    """
    path = find_checkpoint(checkpoint)
    source = load_model(path)
    check_same_model(source.config.to_dict(), model.config.to_dict(), checkpoint)
    if load_tokenizer(path).fingerprint() != tokenizer.fingerprint():
        raise ValueError(
            f"checkpoint.init_from={checkpoint} was trained with another tokenizer; set tokenizer.path={path}"
        )
    name = first_non_finite(source.named_parameters())
    if name is not None:
        raise ValueError(f"checkpoint.init_from={checkpoint}: {name} is not finite; take another checkpoint")
    model.load_state_dict(source.state_dict())


def check_same_model(theirs: dict[str, Any], mine: dict[str, Any], checkpoint: str) -> None:
    """Raises ValueError that names the first key in which the model of a checkpoint is not this run's."""
    for key in mine:
        # How operations are computed is no property of the weights.
        if theirs.get(key) != mine[key] and key != "attention_impl":
            raise ValueError(
                f"checkpoint.init_from={checkpoint} has model.{key}={theirs.get(key)!r} and this run has "
                f"{mine[key]!r}; set it to the checkpoint's, or take its whole model with checkpoint.adopt_model=true"
            )


def adopted_model(checkpoint: str, attention_impl: str) -> DecoderConfig:
    """The configuration of a checkpoint's model, computed as this run says."""
    config = open_checkpoint(find_checkpoint(checkpoint)).config
    return DecoderConfig.from_dict({**config.to_dict(), "attention_impl": attention_impl})
