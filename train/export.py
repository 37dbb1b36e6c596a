"""Exports a trained model for inference, and initializes a run from a checkpoint's weights."""

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

    Called by every rank. An existing export is replaced only after the new one has been written. Raises AgreedError if
    a weight is not finite.
    """
    model = engine.full_model()

    def write() -> None:
        if model is None:
            return
        # Only parameters are checked: a buffer may hold -inf, as a mask does.
        name = first_non_finite(model.named_parameters())
        if name is not None:
            raise TrainingError(f"{name} is not finite: {directory} is not written")
        save_model(directory, model, tokenizer=tokenizer, metadata=metadata)

    agree(write)


def check_export(directory: Path) -> None:
    """Raises ValueError if the export may not replace the directory; called before training."""
    try:
        check_target(directory)
    except ValueError as error:
        raise ValueError(f"run_dir: {error}") from None


def init_from(model: DecoderLM, checkpoint: str, tokenizer: Tokenizer) -> None:
    """Copies the weights of a checkpoint into a new model.

    Raises ValueError that names the field if its model or tokenizer differs from this run's, or a weight is not finite.
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
    """Raises ValueError that names the first key in which a checkpoint's model differs from this run's."""
    for key in mine:
        # attention_impl only selects how operations are computed.
        if theirs.get(key) != mine[key] and key != "attention_impl":
            raise ValueError(
                f"checkpoint.init_from={checkpoint} has model.{key}={theirs.get(key)!r} and this run has "
                f"{mine[key]!r}; set it to the checkpoint's, or take its whole model with checkpoint.adopt_model=true"
            )


def adopted_model(checkpoint: str, attention_impl: str) -> DecoderConfig:
    """The configuration of a checkpoint's model, with `attention_impl` of this run."""
    config = open_checkpoint(find_checkpoint(checkpoint)).config
    return DecoderConfig.from_dict({**config.to_dict(), "attention_impl": attention_impl})
