"""Models on disk: model.safetensors, config.json and tokenizer.model in one directory, written atomically.

No optimiser state and no pickle: what is loaded cannot run code. A reader sees the old directory or the new one,
never half of one.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from attnzoo.files import replace_directory, temporary_directory
from attnzoo.models import DecoderConfig, DecoderLM

if TYPE_CHECKING:
    from attnzoo.tokenizer import Tokenizer

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.model"
FORMAT = "attnzoo-decoder-1"


def save_model(
    directory: Path,
    model: DecoderLM,
    *,
    tokenizer: Path | None = None,
    metadata: dict[str, Any] | None = None,
) -> Path:
    """Writes `model` to `directory`, replacing what was there; returns the directory.

    `tokenizer` is a sentencepiece model file to copy along; `metadata` any JSON (loss, steps, provenance).
    """
    directory = Path(directory)
    temporary = temporary_directory(directory)
    try:
        tensors = {
            name: tensor.detach().contiguous().cpu()
            for name, tensor in model.state_dict().items()
            if not (model.config.tie_embeddings and name == "head.weight")
        }
        save_file(tensors, str(temporary / WEIGHTS))
        content = {"format": FORMAT, "model": model.config.to_dict(), "metadata": metadata or {}}
        (temporary / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            shutil.copyfile(tokenizer, temporary / TOKENIZER)
        replace_directory(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def load_model(directory: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> DecoderLM:
    """Reads a model in evaluation mode; `dtype` None keeps the dtype on disk.

    Raises ValueError, naming the file, when one is missing, damaged or does not fit its config.
    """
    directory = Path(directory)
    config = DecoderConfig.from_dict(_read_config(directory)["model"])
    path = directory / WEIGHTS
    try:
        tensors = load_file(str(path))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; give a directory written by training (its export/)") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); export the model again") from None
    if config.tie_embeddings and "embedding.weight" in tensors:
        tensors["head.weight"] = tensors["embedding.weight"]
    with torch.device("meta"):
        model = DecoderLM(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ValueError(f"{path} does not fit {CONFIG}: {', '.join(odd[:5])} differ; export the model again")
    model.load_state_dict(tensors, assign=True)
    if config.tie_embeddings:
        model.head.weight = model.embedding.weight
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


def load_tokenizer(directory: Path) -> "Tokenizer":
    """The tokenizer saved beside a model. Raises ValueError when there is none."""
    from attnzoo.tokenizer import SentencePieceTokenizer

    path = Path(directory) / TOKENIZER
    if not path.is_file():
        raise ValueError(f"{path} does not exist; save the model with its tokenizer")
    return SentencePieceTokenizer.load(path)


def read_metadata(directory: Path) -> dict[str, Any]:
    """The metadata given to `save_model`."""
    metadata: dict[str, Any] = _read_config(Path(directory))["metadata"]
    return metadata


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} does not exist; give a directory written by training (its export/)") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); export the model again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: format={found!r} is not {FORMAT!r}; export the model with this version")
    return content
