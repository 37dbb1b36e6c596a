"""Loads the tokenizer of a checkpoint from any supported file."""

from pathlib import Path

from attnzoo.tokenizer import huggingface, sentencepiece
from attnzoo.tokenizer.base import Tokenizer
from attnzoo.tokenizer.foreign_sentencepiece import ForeignSentencePieceTokenizer
from attnzoo.tokenizer.gguf import load_gguf_tokenizer
from attnzoo.tokenizer.huggingface import HuggingFaceTokenizer
from attnzoo.tokenizer.sentencepiece import SentencePieceTokenizer, has_own_pieces, read_processor


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a checkpoint.

    `path` is a directory with tokenizer.json or tokenizer.model (the first that is there), one of these two files, or a
    GGUF file. Raises ValueError when it is none of these, and when the file is damaged or not supported.
    """
    path = Path(path)
    try:
        return _load(path)
    except OSError as error:
        raise ValueError(f"'{path}' cannot be read ({error.strerror})") from None


def _load(path: Path) -> Tokenizer:
    names = (huggingface.FILE, sentencepiece.FILE)
    if path.is_dir():
        found = next((path / name for name in names if (path / name).exists()), None)
        if found is None:
            raise ValueError(f"'{path}' holds neither {' nor '.join(names)}; give a checkpoint with its tokenizer")
        path = found
    if not path.exists():
        raise ValueError(f"'{path}' does not exist; give a directory with {' or '.join(names)}, or a GGUF file")
    if path.suffix == ".gguf":
        return load_gguf_tokenizer(path)
    if path.name == huggingface.FILE:
        return HuggingFaceTokenizer.load(path.parent)
    if path.suffix == ".model":
        processor = read_processor(path)
        own = has_own_pieces(processor)
        return SentencePieceTokenizer(processor, path) if own else ForeignSentencePieceTokenizer(processor, path)
    raise ValueError(f"'{path}' is not a tokenizer by its name; known: {', '.join(names)}, *.model, *.gguf")
