"""Begins a run of a language model with the weights of a checkpoint."""

from typing import Any

from attnzoo.checkpoint import find_checkpoint, load_model, load_tokenizer, open_checkpoint
from attnzoo.models import DecoderConfig, DecoderLM
from attnzoo.tokenizer import Tokenizer
from train.finite import first_non_finite


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
