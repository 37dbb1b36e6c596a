"""What every tokenizer does, and text that comes token by token."""

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
    """A token that is written as a whole. control: whether it has a meaning of its own and stands for no text.
    lstrip, rstrip: whether the white space before and after it belongs to it."""

    spelling: str
    control: bool
    lstrip: bool = False
    rstrip: bool = False

    @property
    def is_word(self) -> bool:
        """Whether it is a word, or white space: vocabulary like any other, not something written for machines."""
        text = self.spelling.replace("\u2581", " ").strip()
        return not text or text.isalnum()


class Tokenizer(ABC):
    """Text to token ids and back. Every token stands for bytes of UTF-8; control tokens stand for none.

    vocab_size: ids are below it. bos_id, eos_id, pad_id: begin, end and padding, None where the vocabulary has none.
    stop_ids: tokens that end a text, `eos_id` among them. chat_template: source of the Jinja template that turns a
    conversation into text, None where there is none (see `attnzoo.tokenizer.chat`). strips_first_space: whether
    encoding put a space before the text, which decoding has to take away again. shrinks: how many times shorter, in
    bytes, a text may become before it is cut into tokens; infinite where there is no bound.
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
        """Ids of `text`, between the begin and end ids if asked and the model's texts have such. Raises ValueError for
        lone surrogates."""

    @abstractmethod
    def marks(self) -> dict[int, Mark]:
        """Tokens that are written as wholes and never merged from parts, by their id."""

    def control_tokens(self) -> frozenset[int]:
        """The marks that have a meaning of their own."""
        return frozenset(token for token, mark in self.marks().items() if mark.control)

    def encode_text(self, text: str, control: frozenset[int], *, begins: bool = True) -> list[int]:
        """Ids of `text`, none of them in `control`: whatever it spells, it is text. Raises ValueError as `encode`.

        begins: whether the text stands at the beginning, where some vocabularies put a space before it.
        """
        ids = self._encode_text(text, control, begins)
        if control.isdisjoint(ids):
            return ids
        return [part for token in ids for part in (self._spelled_out(token) if token in control else [token])]

    def _encode_text(self, text: str, control: frozenset[int], begins: bool) -> list[int]:
        """As `encode_text`, with tokens of `control` where the vocabulary insists on them."""
        return self.encode(text)

    def _spelled_out(self, token: int) -> list[int]:
        """The characters of a token's spelling, one by one, or their bytes."""
        ids: list[int] = []
        for char in self.spelling(token).replace("\u2581", " "):
            whole = self._characters.get(char.encode())
            parts = [whole] if whole is not None else [self._characters.get(bytes([byte])) for byte in char.encode()]
            ids += [part for part in parts if part is not None]  # a vocabulary without it drops it anywhere
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
        """A number of tokens that `text` has at least, known without encoding it."""
        return int(len(text.encode(errors="replace")) / (self._longest * self.shrinks))

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes that a token stands for, in the middle of a text; none for control tokens and ids left out.

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

        `start` says whether `ids` begin a text. False is for the continuation of one: its first space is its own.
        """
        text = b"".join(map(self.token_bytes, ids))
        if start and self.strips_first_space:
            text = text.removeprefix(b" ")
        return text.decode("utf-8", errors="replace")

    def decoder(self, *, start: bool = True) -> "StreamDecoder":
        """A decoder for ids that arrive one by one; `start` as in `decode`."""
        return StreamDecoder(self, start=start)


class StreamDecoder:
    """Text as soon as its characters are whole: the pushed texts and the last add up to `decode` of all ids."""

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
    """Whatever a native library raises inside becomes a ValueError that says what is wrong, in its words too.

    The package tokenizers raises plain Exception for all that it does not like, and panics, which are no Exception, for
    what it has not thought of.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what} ({error}); {way_out}") from None


def short_hash(content: bytes) -> str:
    """The beginning of the SHA-256 of some bytes."""
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
