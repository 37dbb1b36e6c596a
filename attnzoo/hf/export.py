"""Models as directories of the model type "attnzoo"."""

import shutil
from pathlib import Path

from attnzoo.checkpoint.huggingface_export import GENERATION, save_tokenizer
from attnzoo.checkpoint.native import saved_tensors
from attnzoo.files import replace_directory, temporary_directory
from attnzoo.hf.modeling import AttnzooForCausalLM
from attnzoo.models import DecoderLM
from attnzoo.tokenizer import Tokenizer


def export_model(directory: Path, model: DecoderLM, *, tokenizer: Tokenizer | None = None) -> Path:
    """Writes any model as `AttnzooForCausalLM`, replacing what was in `directory`; returns it.

    Loading needs `import attnzoo.hf`; `load_model` reads it as well. Raises ValueError for a tokenizer with more ids
    than the model.
    """
    directory = Path(directory)
    temporary = temporary_directory(directory)
    try:
        # Not its own way to the tensors: it refuses buffers that share memory.
        tensors = {f"model.{name}": tensor for name, tensor in saved_tensors(model).items()}
        AttnzooForCausalLM.of(model).save_pretrained(temporary, state_dict=tensors)
        (temporary / GENERATION).unlink(missing_ok=True)
        save_tokenizer(temporary, tokenizer, model.config.vocab_size)
        replace_directory(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory
