"""A language model by the name people have for it."""

import os
from pathlib import Path

import torch

from attnzoo.checkpoint import PACKAGED, find_checkpoint, load_model, load_tokenizer
from attnzoo.checkpoint.packaged import models_directory
from attnzoo.errors import suggest
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

    name: a directory that training (its run directory or the export/ in it) or transformers has written, a .gguf file,
    the name of a model that comes in a package ("smollm2"), or that of a directory or .gguf file in
    $ATTNZOO_HOME/models. Nothing is downloaded. dtype: of the weights, "bfloat16" for example; "auto" keeps the
    checkpoint's, float32 for quantised ones. device: "cpu", "cuda:1"; "auto" takes a GPU where there is one.
    pack_weights: lay weights out for reading on a CPU, twice as fast for single tokens, after which the model can be
    neither trained nor saved (`attnzoo.checkpoint.load_model` gives one that can); None: where the machine can.
    check_finite: refuse weights with NaN or infinity.

    >>> lm = load("smollm2", dtype="bfloat16")    # doctest: +SKIP
    >>> lm.generate("The capital of France is").text    # doctest: +SKIP

    Raises ValueError that says what is wrong and where for a name that leads nowhere, a damaged checkpoint, one without
    a tokenizer, an unknown dtype, or a device that cannot be used.
    """
    if not isinstance(name, str) and not isinstance(name, os.PathLike):
        raise ValueError(f"name={name!r} has type {type(name).__name__}; give a path, or one of {', '.join(PACKAGED)}")
    for option, value, known in (
        ("pack_weights", pack_weights, "True, False or None"),
        ("check_finite", check_finite, "True or False"),
    ):
        if not isinstance(value, bool) and not (value is None and option == "pack_weights"):
            raise ValueError(f"{option}={value!r} must be {known}")
    path = find_checkpoint(os.fspath(name))
    if not os.path.exists(path):
        raise ValueError(_nothing(os.fspath(name)))
    if not isinstance(dtype, torch.dtype | str):
        raise ValueError(f'dtype={dtype!r} has type {type(dtype).__name__}; give a name such as "bfloat16"')
    kind = None if dtype == "auto" else parse_dtype(dtype)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(path)  # soon done, and often what is missing
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
    """`load_model`, and its weights packed where `pack` says so, or, for None, where the machine can. Raises ValueError
    as `load_model`, `check_device` and `pack_weights`."""
    check_device(device)
    model = load_model(path, device=device, dtype=dtype, check_finite=check_finite)
    if pack or (pack is None and can_pack(model)):
        pack_weights(model)
    return model


def _nothing(name: str) -> str:
    """What is wrong with a name that leads nowhere."""
    own = models_directory()
    if os.sep in name or name.endswith(".gguf"):
        return f"checkpoint={name!r} does not exist; give a directory, a .gguf file, or one of {', '.join(PACKAGED)}"
    return (
        f"checkpoint={name!r} is no path that exists, nothing in {str(own)!r} (set ATTNZOO_HOME for another place) and "
        f"no packaged model{suggest(name, PACKAGED)}"
    )
