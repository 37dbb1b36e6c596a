"""Which kind of model a directory holds, and which settings of a server are for which kind."""

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from attnzoo.checkpoint import find_checkpoint
from attnzoo.clinical.trained import holds_trained
from attnzoo.clinical.trained_ldam import holds_ldam
from attnzoo.vision.trained_diffusion import holds_diffusion
from serve.config import EngineConfig, ServeConfig

OF_ALL = ("checkpoint", "threads")
"""Settings of the engine that a server without a language model has too."""
OF_LANGUAGE = (
    *(field.name for field in fields(EngineConfig) if field.name not in OF_ALL),
    *("max_choices", "stream_interval_ms"),
    *(field.name for field in fields(ServeConfig) if "attention" in field.name),
)
OF_CLINICAL = ("clinical_name", "max_patients", "max_explained", "max_predictions", "predict_timeout_s")
OF_DIFFUSION = ("diffusion_name", *(field.name for field in fields(ServeConfig) if "draw" in field.name))


def holds_clinical(path: Path) -> bool:
    """Whether a directory is a clinical model's export, or a run with one."""
    return holds_trained(path) or holds_ldam(path)


def is_clinical(checkpoint: str) -> bool:
    """Whether a checkpoint is a clinical model's export, or a run with one."""
    path = find_checkpoint(checkpoint)
    return path.is_dir() and holds_clinical(path)


def is_diffusion(checkpoint: str) -> bool:
    """Whether a checkpoint is a diffusion model's export, or a run with one."""
    path = find_checkpoint(checkpoint)
    return path.is_dir() and holds_diffusion(path)


def is_language(checkpoint: str) -> bool:
    """Whether a checkpoint is none of the other kinds; whether it is a language model, loading will tell."""
    return not is_clinical(checkpoint) and not is_diffusion(checkpoint)


def refuse(config: ServeConfig, names: Iterable[str], why: str) -> None:
    """Raises ValueError for the first of these settings that is not at its default."""
    refused = frozenset(names)
    for field in fields(ServeConfig):
        if field.name in refused and getattr(config, field.name) != field.default:
            raise ValueError(f"{field.name}={getattr(config, field.name)!r} has no effect: {why}; leave it out")
