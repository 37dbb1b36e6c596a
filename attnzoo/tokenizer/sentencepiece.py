"""Text to token ids and back: sentencepiece pieces with byte fallback, so that any text round-trips exactly.

Sentencepiece writes a space as U+2581; a literal U+2581 in a text would come back as a space. Here decoding goes from
ids to bytes by a table of our own, and a literal U+2581 is encoded as its three bytes.
"""

import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from attnzoo.files import write_atomic
from attnzoo.tokenizer.base import Mark, Tokenizer, check_text, short_hash

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

FILE = "tokenizer.model"
SPACE = "\u2581"
PROBES = [" a", "a  b ", "\ttab\n", "\ufb01\u00a0\uff21e\u0301", "\u4e2d\U0001f600"]
"""Texts that a dummy prefix, trimming or missing byte fallback would change."""
SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
CONTROL, USER_DEFINED = 3, 4
"""Types of pieces."""


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer trained here. Ids 0-3 are padding, begin, end and unknown; they stand for no text."""

    pad_id, bos_id, eos_id, unk_id = 0, 1, 2, 3
    stop_ids = frozenset([eos_id])

    def __init__(self, processor: "SentencePieceProcessor", path: Path) -> None:
        self._processor = processor
        self._path = path
        self.vocab_size: int = processor.get_piece_size()
        self._bytes = [piece_bytes(processor, token) for token in range(self.vocab_size)]
        self._byte_ids = {self._bytes[t]: t for t in range(self.vocab_size) if processor.is_byte(t)}
        self._check()

    @classmethod
    def load(cls, path: Path) -> "SentencePieceTokenizer":
        """Reads a sentencepiece model file. Raises ValueError when it is missing, damaged or cannot round-trip."""
        path = Path(path)
        return cls(read_processor(path), path)

    def _check(self) -> None:
        where = f"tokenizer {os.fspath(self._path)!r}"
        for piece, token in SPECIAL.items():
            if self.vocab_size <= token or self._processor.id_to_piece(token) != piece:
                raise ValueError(f"{where}: token {token} is not {piece!r}; train it with python -m train.tokenizer")
        if len(self._byte_ids) != 256:
            raise ValueError(f"{where} has no byte fallback and cannot hold every text; train with byte_fallback")
        if has_normalisation_rules(self._processor.serialized_model_proto()):
            raise ValueError(
                f"{where} has normalisation rules, which change text: train it with normalisation identity"
            )
        for text in PROBES:
            if self.decode(self.encode(text)) != text:
                raise ValueError(
                    f"{where} changes {text!r}: train it with the identity normalisation, no dummy prefix and "
                    "remove_extra_whitespaces off, as python -m train.tokenizer does"
                )

    def fingerprint(self) -> str:
        return short_hash(self._path.read_bytes())

    @property
    def model(self) -> bytes:
        """The model, serialised."""
        serialised: bytes = self._processor.serialized_model_proto()
        return serialised

    def save(self, directory: Path) -> None:
        """Writes tokenizer.model."""
        write_atomic(Path(directory) / FILE, self._path.read_bytes())

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        check_text(text)
        ids = [self.bos_id] if bos else []
        spelled = [self._byte_ids[bytes([byte])] for byte in SPACE.encode()]
        for part in re.split(f"({SPACE}+)", text):
            if part.startswith(SPACE):
                ids += spelled * len(part)
            elif part:
                ids += self._processor.encode(part)
        return [*ids, self.eos_id] if eos else ids

    def spelling(self, token: int) -> str:
        """The piece, as sentencepiece writes it."""
        piece: str = self._processor.id_to_piece(token)
        return piece

    def marks(self) -> dict[int, Mark]:
        return read_marks(self.model)


def read_marks(model: bytes) -> dict[int, Mark]:
    """The control pieces of a serialised model, which no text contains, and the user-defined ones, which a text may."""
    pieces = enumerate(read_pieces(model))
    return {
        token: Mark(spelling=spelling, control=kind == CONTROL)
        for token, (spelling, _, kind) in pieces
        if kind in (CONTROL, USER_DEFINED)
    }


def read_processor(path: Path) -> "SentencePieceProcessor":
    """The sentencepiece model in a file. Raises ValueError, naming the file, when it is missing or damaged."""
    from sentencepiece import SentencePieceProcessor

    if path.is_dir():
        raise ValueError(f"tokenizer {os.fspath(path)!r} is a directory; give a file")
    if not path.is_file():
        raise ValueError(f"tokenizer {os.fspath(path)!r} does not exist; train one with python -m train.tokenizer")
    try:
        processor = SentencePieceProcessor(model_file=str(path))
        pieces = [processor.id_to_piece(token) for token in range(processor.get_piece_size())]
    except (RuntimeError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"tokenizer {os.fspath(path)!r} is not a sentencepiece model ({error})") from None
    for token, piece in enumerate(pieces):
        if processor.is_byte(token) and not re.fullmatch("<0x[0-9A-F]{2}>", piece):
            raise ValueError(f"tokenizer {os.fspath(path)!r}: token {token} is a byte spelled {piece!r}; copy it again")
    return processor


def has_own_pieces(processor: "SentencePieceProcessor") -> bool:
    """Whether a model has the special pieces of those trained here, where they are expected."""
    size = processor.get_piece_size()
    return all(token < size and processor.id_to_piece(token) == piece for piece, token in SPECIAL.items())


def has_normalisation_rules(model: bytes) -> bool:
    """Whether a serialised sentencepiece model rewrites characters before it encodes.

    Rules may hold for any sequence of characters, so no probe text could find them all. They are
    ModelProto.normalizer_spec (field 3) .precompiled_charsmap (field 2), which is empty or absent for the identity.
    """
    return any(number == 2 and content for spec in _messages(model, 3) for number, content in _protobuf_fields(spec))


def read_pieces(model: bytes) -> list[tuple[str, float, int]]:
    """(spelling, score, type) of all pieces of a serialised model; types as sentencepiece and GGUF number them.

    They are ModelProto.pieces (field 1), messages of piece (1), score (2, a float) and type (3, 1 where it is absent).
    """
    pieces = []
    for message in _messages(model, 1):
        values = dict(_protobuf_fields(message))
        spelling, score, kind = values.get(1, b""), values.get(2, bytes(4)), values.get(3, 1)
        assert isinstance(spelling, bytes)
        assert isinstance(score, bytes)
        assert isinstance(kind, int)
        pieces.append((spelling.decode(), struct.unpack("<f", score)[0], kind))
    return pieces


def is_bpe(model: bytes) -> bool:
    """Whether a serialised model merges pairs: ModelProto.trainer_spec (field 2) .model_type (field 3) is 2."""
    return any(dict(_protobuf_fields(spec)).get(3) == 2 for spec in _messages(model, 2))


def _messages(message: bytes, number: int) -> Iterator[bytes]:
    """Contents of all fields numbered `number`, which hold messages."""
    for found, content in _protobuf_fields(message):
        if found == number:
            assert isinstance(content, bytes), f"field {number} of a model is no message"
            yield content


def _protobuf_fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """(number, content) of the fields of a message: an integer for varints, bytes for all other types."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        tag = varint()
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            yield number, varint()
            continue
        assert kind in (1, 2, 5), f"protobuf wire type {kind} in a model that sentencepiece has read"
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        yield number, message[at : at + size]
        at += size


def piece_bytes(processor: "SentencePieceProcessor", token: int) -> bytes:
    """UTF-8 bytes that a piece stands for; none for control and unknown pieces."""
    piece: str = processor.id_to_piece(token)
    if processor.is_control(token) or processor.is_unknown(token):
        return b""
    if processor.is_byte(token):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE, " ").encode()
