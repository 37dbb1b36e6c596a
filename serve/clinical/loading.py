"""Which clinical models a server has."""

from pathlib import Path

import torch

from attnzoo.checkpoint import find_checkpoint
from attnzoo.clinical.trained_ldam import holds_ldam
from attnzoo.files import user_path
from serve.clinical.clinic import Clinic, Served
from serve.clinical.notes.reader import NoteReader
from serve.clinical.predictor import Predictor
from serve.config import ServeConfig, name_of
from serve.kinds import OF_CLINICAL, OF_LANGUAGE, holds_clinical, is_clinical, refuse


def clinical_sources(config: ServeConfig) -> list[tuple[Path, str]]:
    """(directory, name) of each of the server's clinical models: `checkpoint` where it is one, and `clinical`. Raises
    ValueError for a directory that holds none, for models of one name, and for settings of a kind of model that the
    server does not have."""
    found = []
    if is_clinical(config.checkpoint):
        only = () if config.clinical else ("clinical_name",)
        refuse(config, (*OF_LANGUAGE, *only), f"{config.checkpoint!r} is a clinical model")
        found.append((find_checkpoint(config.checkpoint), config.served_name))
    elif config.clinical is None:
        refuse(config, OF_CLINICAL, "this server has no clinical model (setting clinical)")
    if config.clinical is not None:
        path = user_path(config.clinical, "clinical")
        if not path.is_dir():
            raise ValueError(f"clinical={config.clinical!r} does not exist; train it first, or give another directory")
        if not holds_clinical(path):
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


def load_clinic(config: ServeConfig) -> Clinic | None:
    """The server's clinical models, ready to answer; None where it has none. Raises ValueError."""
    sources = clinical_sources(config)
    if not sources:
        return None
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return Clinic([load_model(*source, config.max_patients) for source in sources], config)
