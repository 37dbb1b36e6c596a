"""What every tokenizer does, and text that comes token by token."""

import codecs
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class Tokenizer(ABC):
    """Text to token ids and back. Every token stands for bytes of UTF-8; control tokens stand for none.

    vocab_size: ids are below it. bos_id, eos_id, pad_id: begin, end and padding, None where the vocabulary has none.
    stop_ids: tokens that end a text, `eos_id` among them. chat_template: source of the Jinja template that turns a
    conversation into text, None where there is none (see `attnzoo.tokenizer.chat`). strips_first_space: whether
    encoding put a space before the text, which decoding has to take away again.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    stop_ids: frozenset[int]
    chat_template: str | None = None
    strips_first_space: bool = False
    _bytes: list[bytes]

    @abstractmethod
    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`, between the begin and end ids if asked and the model's texts have such. Raises ValueError for
        lone surrogates."""

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
