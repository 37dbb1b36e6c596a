"""`attnzoo.load`: reads a language model from a path or a name."""

import os
from pathlib import Path

import torch

from attnzoo.checkpoint import PACKAGED, existing_checkpoint, load_model, load_tokenizer
from attnzoo.language_model import LanguageModel
from attnzoo.models import DecoderLM, can_pack, pack_weights
from attnzoo.types import check_device, parse_dtype


def load(
    name: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    pack_weights: bool | None = None,
    check_finite: bool = True,
) -> LanguageModel:
    """Reads a model and its tokenizer, for inference.

    name: a run directory of training or the export/ in it, a directory that transformers has written, a .gguf file, the
    name of a packaged model ("smollm2"), or the name of a directory or .gguf file in $ATTNZOO_HOME/models. Nothing is
    downloaded. dtype: of the weights, for example "bfloat16"; "auto" keeps the checkpoint's dtype, and takes float32
    for quantised weights. device: for example "cpu" or "cuda:1"; "auto" takes a GPU if there is one. pack_weights:
    store the weights in a layout that makes decoding on a CPU about twice as fast; such a model can be neither trained
    nor saved (`attnzoo.checkpoint.load_model` reads one that can); None: pack if the machine supports it.
    check_finite: refuse weights with NaN or infinity.

    >>> lm = load("smollm2", dtype="bfloat16")    # doctest: +SKIP
    >>> lm.generate("The capital of France is").text    # doctest: +SKIP

    Raises ValueError for a name that is not found, a checkpoint that is damaged or has no tokenizer, an unknown dtype,
    or a device that cannot be used.
    """
    if not isinstance(name, str) and not isinstance(name, os.PathLike):
        raise ValueError(f"name={name!r} has type {type(name).__name__}; give a path, or one of {', '.join(PACKAGED)}")
    for option, value, known in (
        ("pack_weights", pack_weights, "True, False or None"),
        ("check_finite", check_finite, "True or False"),
    ):
        if not isinstance(value, bool) and not (value is None and option == "pack_weights"):
            raise ValueError(f"{option}={value!r} must be {known}")
    path = existing_checkpoint(os.fspath(name))
    if path.exists() and not path.is_dir() and path.suffix != ".gguf":
        raise ValueError(
            f"{path} is neither a directory nor a .gguf file; give the directory that holds config.json, the "
            "weights and the tokenizer"
        )
    if not isinstance(dtype, torch.dtype | str):
        raise ValueError(f'dtype={dtype!r} has type {type(dtype).__name__}; give a name such as "bfloat16"')
    kind = None if dtype == "auto" else parse_dtype(dtype)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(path)  # first: it is quick to read, and often missing
    model = load_for_inference(
        path,
        device=device,
        dtype=kind,
        check_finite=check_finite,
        pack=pack_weights,
    )
    return LanguageModel(model, tokenizer, name=os.fspath(name))


def load_for_inference(
    path: Path, *, device: str | torch.device, dtype: torch.dtype | None, check_finite: bool, pack: bool | None
) -> DecoderLM:
    """Calls `load_model`, then `pack_for_inference`. Raises the ValueError of `load_model`, `check_device` and
    `pack_weights`."""
    check_device(device)
    model = load_model(path, device=device, dtype=dtype, check_finite=check_finite)
    pack_for_inference(model, pack)
    return model


def pack_for_inference(model: DecoderLM, pack: bool | None) -> None:
    """Packs the weights. pack: None packs if the machine supports it. Raises the ValueError of `pack_weights`."""
    if pack or (pack is None and can_pack(model)):
        pack_weights(model)
