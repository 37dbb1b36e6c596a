"""Exports models as directories of the model type "attnzoo"."""

import shutil
from pathlib import Path

from attnzoo.checkpoint.huggingface_export import GENERATION, save_tokenizer
from attnzoo.checkpoint.target import check_export_target, place_export
from attnzoo.files import real_path, temporary_directory
from attnzoo.hf.modeling import AttnzooForCausalLM
from attnzoo.models import DecoderLM
from attnzoo.tokenizer import Tokenizer


def export_model(directory: Path, model: DecoderLM, *, tokenizer: Tokenizer | None = None) -> Path:
    """Writes any model as `AttnzooForCausalLM`, into a directory; returns it.

    Loading needs `import attnzoo.hf`; `load_model` reads it as well. Raises ValueError for a tokenizer with more ids
    than the model, and for a directory that holds anything but an earlier export.
    """
    directory = real_path(directory)
    check_export_target(directory)
    temporary = temporary_directory(directory)
    try:
        AttnzooForCausalLM.of(model).save_pretrained(temporary)
        (temporary / GENERATION).unlink(missing_ok=True)
        save_tokenizer(temporary, tokenizer, model.config.vocab_size)
        return place_export(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
