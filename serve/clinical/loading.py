"""Which clinical models a server has, and which settings are for them."""

from dataclasses import fields
from pathlib import Path

import torch

from attnzoo.checkpoint import find_checkpoint
from attnzoo.clinical.trained import holds_trained
from attnzoo.clinical.trained_ldam import holds_ldam
from attnzoo.files import user_path
from serve.clinical.clinic import Clinic, Served
from serve.clinical.notes.reader import NoteReader
from serve.clinical.predictor import Predictor
from serve.config import EngineConfig, ServeConfig, name_of

OF_BOTH = ("checkpoint", "threads")
"""Settings of the engine that a server without a language model has too."""
OF_LANGUAGE = ("max_choices", "stream_interval_ms", *(f.name for f in fields(ServeConfig) if "attention" in f.name))
OF_CLINICAL = ("clinical_name", "max_patients", "max_explained", "max_predictions", "predict_timeout_s")


def is_clinical(checkpoint: str) -> bool:
    """Whether a checkpoint is a clinical model's export, or a run with one."""
    path = find_checkpoint(checkpoint)
    return path.is_dir() and _holds_clinical(path)


def _holds_clinical(path: Path) -> bool:
    return holds_trained(path) or holds_ldam(path)


def clinical_sources(config: ServeConfig) -> list[tuple[Path, str]]:
    """(directory, name) of each of the server's clinical models: `checkpoint` where it is one, and `clinical`. Raises
    ValueError for a directory that holds none, for models of one name, and for settings of a kind of model that the
    server does not have."""
    found = []
    if is_clinical(config.checkpoint):
        names = [field.name for field in fields(EngineConfig) if field.name not in OF_BOTH]
        only = () if config.clinical else ("clinical_name",)
        _refuse(config, (*names, *OF_LANGUAGE, *only), f"{config.checkpoint!r} is a clinical model")
        found.append((find_checkpoint(config.checkpoint), config.served_name))
    elif config.clinical is None:
        _refuse(config, OF_CLINICAL, "this server has no clinical model (setting clinical)")
    if config.clinical is not None:
        path = user_path(config.clinical, "clinical")
        if not _holds_clinical(path):
            raise ValueError(
                f"clinical={config.clinical!r} holds no clinical model; give the run or export directory of a training "
                "run with task.kind=clinical or ldam"
            )
        name = config.clinical_name or name_of(config.clinical)
        if name == config.served_name:
            raise ValueError(f"both models are called {name!r}; set clinical_name or model_name")
        found.append((path, name))
    return found


def load_model(path: Path, name: str, max_patients: int) -> Served:
    """The model of an export. Raises ValueError."""
    return (NoteReader if holds_ldam(path) else Predictor).load(path, name, max_patients)


def check_clinical(config: ServeConfig) -> None:
    """Raises ValueError where a clinical model of a configuration cannot be served."""
    for source in clinical_sources(config):
        load_model(*source, config.max_patients)


def _refuse(config: ServeConfig, names: tuple[str, ...], why: str) -> None:
    for field in fields(ServeConfig):
        if field.name in names and getattr(config, field.name) != field.default:
            raise ValueError(f"{field.name}={getattr(config, field.name)!r} has no effect: {why}; leave it out")


def load_clinic(config: ServeConfig) -> Clinic | None:
    """The server's clinical models, ready to answer; None where it has none. Raises ValueError."""
    sources = clinical_sources(config)
    if not sources:
        return None
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return Clinic([load_model(*source, config.max_patients) for source in sources], config)
