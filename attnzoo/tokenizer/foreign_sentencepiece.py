"""Sentencepiece models trained elsewhere (Llama 2, Mistral): tokenizer.model with its own rules and special ids.

Models trained here round-trip any text, and `SentencePieceTokenizer` refuses others. Models trained elsewhere put a
space before a text, and some rewrite characters: they decode as sentencepiece itself does.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from attnzoo.files import write_atomic
from attnzoo.tokenizer.base import Mark, Tokenizer, check_text, short_hash
from attnzoo.tokenizer.sentencepiece import FILE, SPACE, piece_bytes, read_marks, read_processor

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


class ForeignSentencePieceTokenizer(Tokenizer):
    """A sentencepiece model with its own rules. It has no chat template; special pieces in a text stay text."""

    shrinks = float("inf")  # its rules may drop any character, and one unknown piece may stand for many

    def __init__(self, processor: "SentencePieceProcessor", path: Path) -> None:
        self._processor = processor
        self._path = path
        self.vocab_size = processor.get_piece_size()
        self.bos_id, self.eos_id, self.pad_id = (
            token if token >= 0 else None for token in (processor.bos_id(), processor.eos_id(), processor.pad_id())
        )
        self.stop_ids = frozenset() if self.eos_id is None else frozenset([self.eos_id])
        self._bytes = [piece_bytes(processor, token) for token in range(self.vocab_size)]
        unknown = processor.unk_id()
        # The model says what text the unknown piece stands for; inside a text, spaces around it are kept.
        self._bytes[unknown] = processor.decode([unknown]).encode()
        first: str = processor.id_to_piece(processor.encode("a")[0])
        self.strips_first_space = first.startswith(SPACE)

    @classmethod
    def load(cls, path: Path) -> "ForeignSentencePieceTokenizer":
        """Reads a sentencepiece model file. Raises ValueError when it is missing or damaged."""
        path = Path(path)
        return cls(read_processor(path), path)

    def fingerprint(self) -> str:
        return short_hash(self._path.read_bytes())

    def save(self, directory: Path) -> None:
        """Writes tokenizer.model."""
        write_atomic(Path(directory) / FILE, self._path.read_bytes())

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        check_text(text)
        ids: list[int] = self._processor.encode(text)
        begin = [self.bos_id] if bos and self.bos_id is not None else []
        return begin + ids + ([self.eos_id] if eos and self.eos_id is not None else [])

    def spelling(self, token: int) -> str:
        """The piece, as sentencepiece writes it."""
        piece: str = self._processor.id_to_piece(token)
        return piece

    def marks(self) -> dict[int, Mark]:
        return read_marks(self._processor.serialized_model_proto())
