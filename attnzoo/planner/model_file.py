"""Reads a model's configuration from a training config, a checkpoint, or a config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from attnzoo.apps import directory, find_config
from attnzoo.checkpoint import CONFIG, PACKAGED, find_checkpoint, open_checkpoint
from attnzoo.checkpoint.huggingface import read_config
from attnzoo.checkpoint.packaged import EXPORT
from attnzoo.errors import suggest
from attnzoo.files import read_object
from attnzoo.models import DecoderConfig
from attnzoo.settings import read_mapping

DEFAULT_VOCABULARY = 32768


@dataclass(frozen=True)
class ModelFile:
    """A model's configuration. vocabulary_source: where the vocabulary's size comes from, for the printed plan."""

    config: DecoderConfig
    vocabulary_source: str


def _near(path: Path) -> str:
    """The end of a message: the nearest name among the configurations that ship and the packaged models."""
    configs = {each.name for each in (directory() / "configs").glob("*.yaml")}
    return suggest(path.name, {*configs, *PACKAGED}) if path.parent == Path(".") else ""


def read_model(path: Path, vocab_size: int | None = None) -> ModelFile:
    """Reads the configuration in `path`: a training config with its `base:` files (a bare name is looked up in
    configs/), a run directory, a checkpoint directory of attnzoo or transformers (weights are not needed) or its
    config.json, a .gguf file, or a name that `find_checkpoint` accepts.

    A training config contributes its `model` section and `tokenizer.vocab_size`; `vocab_size` overrides the size.
    Raises ValueError that names the file and the key, or the option.
    """
    if vocab_size is not None and vocab_size < 1:
        raise ValueError(f"--vocab-size={vocab_size} must be at least 1")
    path = find_checkpoint(str(path)) if str(path) in PACKAGED else path
    if path.suffix == ".gguf":
        config = open_checkpoint(path).config
        return ModelFile(config if vocab_size is None else replace(config, vocab_size=vocab_size), _whose(vocab_size))
    path = find_config(path, "--model")
    if not path.exists() and (kept := find_checkpoint(str(path))).exists():
        path = kept  # what people keep in one place
    if path.is_dir():
        path = _in_directory(path)
    if not path.is_file():
        raise ValueError(f"--model: no file {str(path)!r}; give a training config (.yaml) or a checkpoint{_near(path)}")
    content = read_object(path) if path.suffix == ".json" else _read_yaml(path, ())
    if "model_type" in content:
        config = read_config(content, path)
        return ModelFile(config if vocab_size is None else replace(config, vocab_size=vocab_size), _whose(vocab_size))
    task = content.get("task")
    kind = task.get("kind", "language") if isinstance(task, Mapping) else "language"
    if kind != "language":
        raise ValueError(f"{path}: task.kind={kind!r} trains no language model, and only those are planned")
    section = content.get("model", content)
    if not isinstance(section, Mapping):
        raise ValueError(f"{path}: model={section!r} must be a section with keys such as model_dim")
    values = dict(section)
    source = "the model's own"
    if vocab_size is not None:
        values["vocab_size"], source = vocab_size, "--vocab-size"
    elif "vocab_size" not in values:
        tokenizer = content.get("tokenizer") or {}
        found = tokenizer.get("vocab_size") if isinstance(tokenizer, Mapping) else None
        values["vocab_size"] = DEFAULT_VOCABULARY if found is None else found
        source = "a default; --vocab-size sets it" if found is None else "tokenizer.vocab_size; --vocab-size sets it"
    try:
        return ModelFile(DecoderConfig.from_dict(values), source)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _in_directory(path: Path) -> Path:
    """The configuration of a checkpoint, or of a run: its export's, before there is one what the run began with."""
    places = (path / CONFIG, path / EXPORT / CONFIG, path / "config.yaml")
    return next((place for place in places if place.is_file()), path / CONFIG)


def _whose(vocab_size: int | None) -> str:
    return "the model's own" if vocab_size is None else "--vocab-size"


def _read_yaml(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """A YAML file merged over its base files as training does it. `attention` replaces the base's section if it names a
    kind, and else is merged with it. seen: files that led here, to find cycles."""
    if path.resolve() in seen:
        raise ValueError(f"{path}: base files form a cycle")
    content = read_mapping(path)[0] or {}
    base = content.pop("base", None)
    if base is None:
        return content
    base_path = path.parent / str(base)
    if not base_path.is_file():
        raise ValueError(f"{path}: base: {base} does not exist beside it; give its path from there")
    return _merged(_read_yaml(base_path, (*seen, path.resolve())), content)


def _merged(base: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in content.items():
        known = merged.get(key)
        replaces = key == "attention" and isinstance(value, dict) and "kind" in value
        if isinstance(known, dict) and isinstance(value, dict) and not replaces:
            merged[key] = _merged(known, value)
        else:
            merged[key] = value
    return merged
