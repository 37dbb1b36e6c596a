"""The interface of tokenizers, and decoding token by token."""

import codecs
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A token that is matched as a whole in text. control: whether it has a special meaning and stands for no text.
    lstrip, rstrip: whether the white space before and after it belongs to it."""

    spelling: str
    control: bool
    lstrip: bool = False
    rstrip: bool = False

    @property
    def is_word(self) -> bool:
        """Whether its spelling is a word or white space, which any text may hold."""
        text = self.spelling.replace("\u2581", " ").strip()
        return not text or text.isalnum()


class Tokenizer(ABC):
    """Text to token ids and back. Every token stands for bytes of UTF-8; control tokens stand for none.

    vocab_size: ids are below it. bos_id, eos_id, pad_id: begin, end and padding, None where the vocabulary has none.
    stop_ids: tokens that end a text, `eos_id` among them. chat_template: source of the Jinja template that turns a
    conversation into text, None where there is none (see `attnzoo.tokenizer.chat`). strips_first_space: whether
    encoding put a space before the text, which decoding has to take away again. shrinks: the factor by which
    normalisation may shorten a text, in bytes; infinite where there is no bound.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    stop_ids: frozenset[int]
    chat_template: str | None = None
    strips_first_space: bool = False
    shrinks: float = 1.0
    _bytes: list[bytes]

    @abstractmethod
    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`. bos, eos: with the begin or end id, where the model's texts have one. Raises ValueError for
        lone surrogates."""

    @abstractmethod
    def marks(self) -> dict[int, Mark]:
        """Tokens that are matched as a whole and never merged from parts, by their id."""

    def control_tokens(self) -> frozenset[int]:
        """Ids of the marks with a special meaning."""
        return frozenset(token for token, mark in self.marks().items() if mark.control)

    def encode_text(self, text: str, control: frozenset[int], *, begins: bool = True) -> list[int]:
        """Ids of `text`, none of them in `control`: a control token's spelling is plain text. Raises ValueError as
        `encode`.

        begins: whether the text stands at the beginning, where some vocabularies put a space before it.
        """
        ids = self._encode_text(text, control, begins)
        if control.isdisjoint(ids):
            return ids
        return [part for token in ids for part in (self._spelled_out(token) if token in control else [token])]

    def _encode_text(self, text: str, control: frozenset[int], begins: bool) -> list[int]:
        """As `encode_text`, but a vocabulary that cannot avoid tokens of `control` may return them."""
        return self.encode(text)

    def _spelled_out(self, token: int) -> list[int]:
        """The characters of a token's spelling, one by one, or their bytes."""
        ids: list[int] = []
        for char in self.spelling(token).replace("\u2581", " "):
            whole = self._characters.get(char.encode())
            parts = [whole] if whole is not None else [self._characters.get(bytes([byte])) for byte in char.encode()]
            ids += [part for part in parts if part is not None]  # a vocabulary without a character always drops it
        return ids

    @cached_property
    def _characters(self) -> dict[bytes, int]:
        """Tokens of one character or byte, those that are spelled as bytes last."""
        marks = self.marks()
        found: dict[bytes, int] = {}
        for token, data in enumerate(self._bytes):
            single = token not in marks and len(data.decode("utf-8", errors="replace")) == 1
            if single and (data not in found or self.spelling(found[data]).startswith("<0x")):
                found[data] = token
        return found

    @cached_property
    def _longest(self) -> int:
        return max(1, *map(len, self._bytes), *(len(mark.spelling.encode()) for mark in self.marks().values()))

    def least_tokens(self, text: str) -> int:
        """A lower bound on the number of tokens of `text`, without encoding it."""
        return int(len(text.encode(errors="replace")) / (self._longest * self.shrinks))

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes that a token stands for, in the middle of a text; empty for control tokens and unused ids.

        Raises ValueError for an id outside the vocabulary.
        """
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token {token} is outside the vocabulary of {self.vocab_size}")
        return self._bytes[token]

    @abstractmethod
    def spelling(self, token: int) -> str:
        """How the vocabulary writes a token, control tokens included: what a chat template puts into its text."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that two tokenizers share only when they are the same."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Writes what `load_tokenizer` reads into a directory."""

    def decode(self, ids: Iterable[int], *, start: bool = True) -> str:
        """The text of `ids`; what is not UTF-8 becomes U+FFFD. Raises ValueError for an id outside the vocabulary.

        start: whether `ids` begin a text. A continuation (False) keeps its first space.
        """
        text = b"".join(map(self.token_bytes, ids))
        if start and self.strips_first_space:
            text = text.removeprefix(b" ")
        return text.decode("utf-8", errors="replace")

    def decoder(self, *, start: bool = True) -> "StreamDecoder":
        """A decoder for ids that arrive one by one; `start` as in `decode`."""
        return StreamDecoder(self, start=start)


class StreamDecoder:
    """Decodes ids one by one into whole characters. The texts of `push` and `finish` add up to `decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer, *, start: bool = True) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip = start and tokenizer.strips_first_space

    def push(self, token: int) -> str:
        """The characters that `token` completes; "" while one is still open."""
        piece = self._tokenizer.token_bytes(token)
        if self._strip and piece:
            self._strip = False
            piece = piece.removeprefix(b" ")
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """What is left: U+FFFD for a character that was never completed."""
        return self._utf8.decode(b"", final=True)


@contextmanager
def refused(what: str, way_out: str) -> Iterator[None]:
    """Turns any error of a native library into a ValueError with `what`, the library's message and `way_out`.

    The package tokenizers raises plain Exception for input that it refuses, and a PanicException, which is not an
    Exception, for cases that it does not handle.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what} ({error}); {way_out}") from None


def short_hash(content: bytes) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of `content`."""
    return hashlib.sha256(content).hexdigest()[:16]


def check_text(text: str) -> None:
    """Raises ValueError for a text that UTF-8 cannot represent."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text holds a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}, "
            "which UTF-8 cannot represent; remove it"
        ) from None
