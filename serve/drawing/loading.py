"""Which diffusion model a server has."""

from pathlib import Path

import torch

from attnzoo.checkpoint import find_checkpoint
from attnzoo.files import user_path
from attnzoo.vision.trained_diffusion import holds_diffusion
from serve.clinical.loading import clinical_sources
from serve.config import ServeConfig, name_of
from serve.drawing.studio import Artist, Studio
from serve.kinds import OF_DIFFUSION, OF_LANGUAGE, is_diffusion, refuse


def diffusion_source(config: ServeConfig) -> tuple[Path, str] | None:
    """(directory, name) of the server's diffusion model: `checkpoint` where it is one, or `diffusion`; None without.
    Raises ValueError for a directory that holds none, for models of one name, and for settings of a kind of model that
    the server does not have."""
    if is_diffusion(config.checkpoint):
        names = (*OF_LANGUAGE, "diffusion", "diffusion_name")
        refuse(config, names, f"{config.checkpoint!r} is a diffusion model")
        return find_checkpoint(config.checkpoint), config.served_name
    if config.diffusion is None:
        refuse(config, OF_DIFFUSION, "this server has no diffusion model (setting diffusion)")
        return None
    path = user_path(config.diffusion, "diffusion")
    if not holds_diffusion(path):
        raise ValueError(
            f"diffusion={config.diffusion!r} holds no diffusion model; give the run or export directory of a training "
            "run with task.kind=diffusion"
        )
    name = config.diffusion_name or name_of(config.diffusion)
    if name in (config.served_name, *(name for _, name in clinical_sources(config))):
        raise ValueError(f"two models are called {name!r}; set diffusion_name")
    return path, name


def check_diffusion(config: ServeConfig) -> None:
    """Raises ValueError where the diffusion model of a configuration cannot be served."""
    source = diffusion_source(config)
    if source is not None:
        Artist.load(*source)


def load_studio(config: ServeConfig) -> Studio | None:
    """The server's diffusion model, ready to draw; None where it has none. Raises ValueError."""
    source = diffusion_source(config)
    if source is None:
        return None
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return Studio(Artist.load(*source), config)
