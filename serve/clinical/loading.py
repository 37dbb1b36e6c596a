"""Which clinical model a server has, and which settings are for it."""

from dataclasses import fields
from pathlib import Path

import torch

from attnzoo.checkpoint import find_checkpoint
from attnzoo.clinical.trained import holds_trained
from attnzoo.files import user_path
from serve.clinical.clinic import Clinic
from serve.clinical.predictor import Predictor
from serve.config import EngineConfig, ServeConfig, name_of

OF_BOTH = ("checkpoint", "threads")
"""Settings of the engine that a server without a language model has too."""
OF_LANGUAGE = ("max_choices", "stream_interval_ms", *(f.name for f in fields(ServeConfig) if "attention" in f.name))
OF_CLINICAL = ("clinical_name", "max_patients", "max_explained", "max_predictions", "predict_timeout_s")


def is_clinical(checkpoint: str) -> bool:
    """Whether a checkpoint is a clinical model's export, or a run with one."""
    path = find_checkpoint(checkpoint)
    return path.is_dir() and holds_trained(path)


def clinical_source(config: ServeConfig) -> tuple[Path, str] | None:
    """(directory, name) of the server's clinical model; None where it has none. Raises ValueError for two of them, for
    a directory that holds none, and for settings of a kind of model that the server does not have."""
    if is_clinical(config.checkpoint):
        if config.clinical is not None:
            raise ValueError(
                f"checkpoint={config.checkpoint!r} is a clinical model, and so is clinical={config.clinical!r}; a "
                "server has one of them: leave clinical out"
            )
        names = [field.name for field in fields(EngineConfig) if field.name not in OF_BOTH]
        _refuse(config, (*names, *OF_LANGUAGE, "clinical_name"), f"{config.checkpoint!r} is a clinical model")
        return find_checkpoint(config.checkpoint), config.served_name
    if config.clinical is None:
        _refuse(config, OF_CLINICAL, "this server has no clinical model (setting clinical)")
        return None
    path = user_path(config.clinical, "clinical")
    if not holds_trained(path):
        raise ValueError(
            f"clinical={config.clinical!r} holds no clinical model; give the run or export directory of a training run "
            "with task.kind=clinical"
        )
    name = config.clinical_name or name_of(config.clinical)
    if name == config.served_name:
        raise ValueError(f"both models are called {name!r}; set clinical_name or model_name")
    return path, name


def check_clinical(config: ServeConfig) -> None:
    """Raises ValueError where the clinical model of a configuration cannot be served."""
    source = clinical_source(config)
    if source is not None:
        Predictor.load(*source, config.max_patients)


def _refuse(config: ServeConfig, names: tuple[str, ...], why: str) -> None:
    for field in fields(ServeConfig):
        if field.name in names and getattr(config, field.name) != field.default:
            raise ValueError(f"{field.name}={getattr(config, field.name)!r} has no effect: {why}; leave it out")


def load_clinic(config: ServeConfig) -> Clinic | None:
    """The server's clinical model, ready to answer; None where it has none. Raises ValueError."""
    source = clinical_source(config)
    if source is None:
        return None
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return Clinic(Predictor.load(*source, config.max_patients), config)
