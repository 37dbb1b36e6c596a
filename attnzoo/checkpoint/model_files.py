"""Directories of trained models that are no language models: config.json, model.safetensors and JSON files beside them,
replaced as one.

`attnzoo.clinical.trained`, `trained_ldam`, `trained_sensors` and `attnzoo.vision.trained_diffusion` say what is in
them. Loading cannot run code.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from attnzoo.checkpoint.target import check_native_target
from attnzoo.errors import suggest
from attnzoo.files import read_object, real_path, replace_directory, temporary_directory

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def check_target(directory: Path, format: str, others: tuple[str, ...]) -> None:
    """Raises ValueError, naming what would be lost, unless a model of this format may be written to `directory`."""
    check_native_target(directory, config=CONFIG, format=format, names=(CONFIG, WEIGHTS, *others))


def write(directory: Path, content: Mapping[str, Any], model: nn.Module, others: Mapping[str, Any]) -> Path:
    """Writes content (with its "format") as config.json, the weights, and `others` by the names of their files;
    returns the directory. Raises ValueError as `check_target`."""
    directory = real_path(directory)
    check_target(directory, content["format"], tuple(others))
    temporary = temporary_directory(directory)
    try:
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
        save_file(tensors, str(temporary / WEIGHTS))
        for name, values in {CONFIG: content, **others}.items():
            (temporary / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        replace_directory(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def find(directory: Path | str) -> Path:
    """The directory of the export: this one, or `export` in a run directory."""
    path = Path(directory)
    return path / "export" if (path / "export" / CONFIG).is_file() else path


def holds(directory: Path | str, format: str) -> bool:
    """Whether a directory, or a run's export, holds a model of this format, damaged or not."""
    try:
        return read_object(find(directory) / CONFIG).get("format") == format
    except (OSError, ValueError):
        return False


def digests(path: Path, *others: str) -> tuple[str, str]:
    """(version of an export, sha256 of its weights). others: names of its files beside configuration and weights."""
    content = [(path / file).read_bytes() for file in (CONFIG, WEIGHTS, *others)]
    version = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in content)).hexdigest()
    return version[:16], hashlib.sha256(content[1]).hexdigest()


def read(
    path: Path, format: str, keys: tuple[str, ...], others: tuple[str, ...], *, config: str = CONFIG
) -> list[dict[str, Any]]:
    """config.json (`config`: another name of it) and the other files. Raises ValueError that names the file if one is
    missing or of another format, and for an unknown key."""
    try:
        content, *rest = [read_object(path / name) for name in (config, *others)]
    except FileNotFoundError as error:
        raise ValueError(f"{path} holds no trained model of format {format!r} ({error})") from None
    if content.get("format") != format:
        raise ValueError(f"{path / config}: format {content.get('format')!r} is not {format!r}")
    for key in content:
        if key not in keys:
            raise ValueError(f"{path / config}: unknown key {key}{suggest(key, keys)}; export the model again")
    return [content, *rest]


@contextmanager
def damage(path: Path) -> Iterator[None]:
    """What goes wrong while a model is built from its files is a ValueError that says that they are damaged."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path} is damaged ({reason}); export the model again") from None


def load_weights(path: Path, model: nn.Module) -> None:
    """Into the model, which is then in evaluation mode."""
    model.load_state_dict(load_file(path / WEIGHTS))
    model.eval()
