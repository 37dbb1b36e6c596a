"""The work of `attnzoo export`: writes a checkpoint as a directory that transformers reads."""

import argparse
from collections.abc import Callable
from pathlib import Path

from attnzoo.attention import PLUGINS_VARIABLE, is_plugin
from attnzoo.checkpoint import existing_checkpoint, export_model, load_model
from attnzoo.checkpoint.huggingface_export import family_config
from attnzoo.checkpoint.target import check_export_target
from attnzoo.files import real_path, user_path
from attnzoo.models import DecoderConfig
from attnzoo.tokenizer import Tokenizer, huggingface, load_tokenizer, sentencepiece


def run(chosen: argparse.Namespace) -> int:
    """Exports and says what was written. Raises ValueError for wrong usage."""
    path, out = existing_checkpoint(chosen.checkpoint), real_path(user_path(chosen.out, "OUT"))
    _check_target(path, out)
    model, tokenizer = load_model(path), _tokenizer(path)
    form, reason = _form(model.config, chosen.format)
    try:
        _writer(form)(out, model, tokenizer=tokenizer)
    except OSError as error:
        raise ValueError(f"OUT={str(out)!r} cannot be written ({error.strerror}); give another directory") from None
    print(f"{chosen.out}: {form}, {model.num_parameters():,} parameters, {model.embedding.weight.dtype}")
    if reason:
        print(reason)
    for kind in plugged_in(model.config):
        print(f"{kind} is a variant of {PLUGINS_VARIABLE}, which must name its file wherever the model is loaded")
    if tokenizer is None:
        print("without a tokenizer: the checkpoint has none")
    before = "import attnzoo.hf, then " if form == "attnzoo" else ""
    print(f"load it: {before}AutoModelForCausalLM.from_pretrained({str(chosen.out)!r})")
    return 0


def plugged_in(config: DecoderConfig) -> list[str]:
    """Names of the model's attention variants that come from plug-ins, sorted."""
    kinds = {config.layer_attention(layer)[0] for layer in range(config.num_layers)}
    return sorted(kind for kind in kinds if is_plugin(kind))


def _writer(kind: str) -> Callable[..., Path]:
    """The function that writes a model in the form `kind`. Raises ValueError if a package that it needs is missing."""
    if kind != "attnzoo":
        return export_model
    try:
        from attnzoo.hf import export_model as export
    except ImportError as error:
        raise ValueError(str(error)) from None
    return export


def _form(config: DecoderConfig, asked: str) -> tuple[str, str]:
    """(model type to write, why it is not a native one). Raises ValueError for --format native without such a form."""
    if asked == "attnzoo":
        return asked, ""
    try:
        return family_config(config)["model_type"], ""
    except ValueError as error:
        if asked == "native":
            raise
        return "attnzoo", str(error).partition("; ")[0]


def _check_target(path: Path, out: Path) -> None:
    """Raises ValueError if replacing the directory `out` would delete anything but an earlier export."""
    if out == real_path(Path.cwd()):
        raise ValueError(f"OUT={str(out)!r} is the current directory, which would be replaced; give one in it")
    if path == out or out in path.parents:
        raise ValueError(f"OUT={str(out)!r} holds the checkpoint itself and would be replaced; give another directory")
    if path.is_dir() and path in out.parents:
        raise ValueError(
            f"OUT={str(out)!r} lies in the checkpoint {str(path)!r}, which could not be replaced any more; give "
            "another directory"
        )
    try:
        check_export_target(out)
    except ValueError as error:
        raise ValueError(f"OUT: {error}") from None


def _tokenizer(path: Path) -> Tokenizer | None:
    """The checkpoint's tokenizer; None for a directory without one."""
    names = (huggingface.FILE, sentencepiece.FILE)
    if path.is_dir() and not any((path / name).exists() for name in names):
        return None
    return load_tokenizer(path)
