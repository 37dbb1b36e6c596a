"""Text to token ids and back: sentencepiece pieces with byte fallback, so that any text round-trips exactly.

Sentencepiece writes a space as U+2581; a literal U+2581 in a text would come back as a space. Here decoding goes from
ids to bytes by a table of our own, and a literal U+2581 is encoded as its three bytes.
"""

import codecs
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from attnzoo.files import write_atomic

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

SPACE = "\u2581"
PROBES = [" a", "a  b ", "\ttab\n", "\ufb01\u00a0\uff21e\u0301", "\u4e2d\U0001f600"]
"""Texts that a dummy prefix, trimming or missing byte fallback would change."""
SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}


class Tokenizer:
    """A trained tokenizer. Ids 0-3 are padding, begin, end and unknown; they stand for no text."""

    pad_id, bos_id, eos_id, unk_id = 0, 1, 2, 3

    def __init__(self, processor: "SentencePieceProcessor", path: Path) -> None:
        self._processor = processor
        self._path = path
        self.vocab_size: int = processor.get_piece_size()
        self._bytes = [_piece_bytes(processor, token) for token in range(self.vocab_size)]
        self._byte_ids = {self._bytes[t]: t for t in range(self.vocab_size) if processor.is_byte(t)}
        self._check()

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Reads a sentencepiece model file. Raises ValueError when it is missing, damaged or cannot round-trip."""
        from sentencepiece import SentencePieceProcessor

        path = Path(path)
        if not path.is_file():
            raise ValueError(f"tokenizer {os.fspath(path)!r} does not exist; train one with python -m train.tokenizer")
        try:
            processor = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"tokenizer {os.fspath(path)!r} is not a sentencepiece model ({error})") from None
        return cls(processor, path)

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

    def save(self, path: Path) -> None:
        """Writes the model file."""
        write_atomic(Path(path), self._path.read_bytes())

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`, between the begin and end ids if asked. Raises ValueError for lone surrogates."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text holds a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}, "
                "which UTF-8 cannot represent; remove it"
            ) from None
        ids = [self.bos_id] if bos else []
        for part in re.split(f"({SPACE})", text):
            if part == SPACE:
                ids += [self._byte_ids[bytes([byte])] for byte in SPACE.encode()]
            elif part:
                ids += self._processor.encode(part)
        return [*ids, self.eos_id] if eos else ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; what is not UTF-8 becomes U+FFFD. Raises ValueError for an id outside the vocabulary."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes that a token stands for; none for control tokens."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token {token} is outside the vocabulary of {self.vocab_size}")
        return self._bytes[token]

    def decoder(self) -> "StreamDecoder":
        """A decoder for ids that arrive one by one."""
        return StreamDecoder(self)


class StreamDecoder:
    """Text as soon as its characters are whole: the pushed texts and the last add up to `decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that `token` completes; "" while one is still open."""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """What is left: U+FFFD for a character that was never completed."""
        return self._utf8.decode(b"", final=True)


def has_normalisation_rules(model: bytes) -> bool:
    """Whether a serialised sentencepiece model rewrites characters before it encodes.

    Rules may hold for any sequence of characters, so no probe text could find them all. They are
    ModelProto.normalizer_spec (field 3) .precompiled_charsmap (field 2), which is empty or absent for the identity.
    """
    specs = (content for number, content in _protobuf_fields(model) if number == 3)
    return any(number == 2 and content for spec in specs for number, content in _protobuf_fields(spec))


def _protobuf_fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, content) of the fields of a message; content is empty for fields that are plain numbers."""
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
            varint()
            yield number, b""
            continue
        assert kind in (1, 2, 5), f"protobuf wire type {kind} in a model that sentencepiece has read"
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        yield number, message[at : at + size] if kind == 2 else b""
        at += size


def _piece_bytes(processor: "SentencePieceProcessor", token: int) -> bytes:
    piece: str = processor.id_to_piece(token)
    if processor.is_control(token) or processor.is_unknown(token):
        return b""
    if processor.is_byte(token):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE, " ").encode()
