"""Tokenizers of open-weight checkpoints: tokenizer.json and the files beside it.

The package tokenizers turns text into ids; a byte table of our own turns ids into text, so that text can be streamed
byte by byte. Special tokens that are written in a text become those tokens, as they do in transformers, unless the
vocabulary has `split_special_tokens`.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnzoo.files import parse_object, read_object, read_text, write_atomic
from attnzoo.tokenizer.base import Mark, Tokenizer, check_text, refused, short_hash
from attnzoo.tokenizer.byte_table import byte_table, decoder_steps

if TYPE_CHECKING:
    import tokenizers

FILE = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
GENERATION = "generation_config.json"
MODEL = "config.json"
MAX_BYTES = 256 << 20
"""Largest size of tokenizer.json; those in use have up to 35 MB."""
LONG = 4096
"""Texts of more characters than this take milliseconds to encode."""


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """What tokenizer.json does not say.

    bos_token, eos_token, pad_token: spellings of the begin, end and padding tokens. stop_ids: tokens that end a text,
    besides `eos_token`. The post-processor in tokenizer.json decides whether texts begin with `bos_token`.
    split_special_tokens: whether special tokens that are written in a text stay text.
    """

    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    stop_ids: frozenset[int] = frozenset()
    chat_template: str | None = None
    split_special_tokens: bool = False


class HuggingFaceTokenizer(Tokenizer):
    """A vocabulary of the package tokenizers: byte-level BPE, or BPE that writes a space as U+2581.

    `encode(bos=True)` adds a begin token only where the post-processor does. A checkpoint may name a begin token
    without using it; the flag add_bos_token, which older loaders read, is ignored here as it is in transformers 5.
    """

    def __init__(
        self,
        tokenizer: "tokenizers.Tokenizer",
        settings: TokenizerSettings,
        *,
        source: str,
        files: tuple[Path, ...] = (),
    ) -> None:
        """`source` names the vocabulary in errors. `save` copies `files`, or writes the two objects."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = settings.split_special_tokens
        self._tokenizer = tokenizer
        self._settings = settings
        self._files = files
        self._text_backends: tuple[frozenset[int], tokenizers.Tokenizer, tokenizers.Tokenizer] | None = None
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = _vocab_size(vocab, source)
        self._bytes, self.strips_first_space = byte_table(tokenizer, vocab, source)
        self.shrinks = _shrinks(tokenizer)
        prefix = _prefix(tokenizer, source)
        bos = self._find("bos_token", source)
        self.bos_id = prefix if bos is None else bos
        self.eos_id = self._find("eos_token", source)
        self.pad_id = self._find("pad_token", source)
        self.stop_ids = settings.stop_ids | ({self.eos_id} if self.eos_id is not None else set())
        outside = [token for token in self.stop_ids if not 0 <= token < self.vocab_size]
        if outside:
            raise ValueError(
                f"{source}: stop token {outside[0]} is outside the vocabulary of {self.vocab_size}; its configuration "
                "belongs to another tokenizer: download both again"
            )
        self._begin = [] if prefix is None else [prefix]
        self.chat_template = settings.chat_template

    @classmethod
    def load(cls, directory: Path) -> "HuggingFaceTokenizer":
        """Reads tokenizer.json, and, if they exist beside it, tokenizer_config.json, special_tokens_map.json,
        chat_template.jinja, generation_config.json and config.json. Raises ValueError, naming the file, when
        tokenizer.json is missing, or a file is damaged or does not fit."""
        directory = Path(directory)
        path = directory / FILE
        tokenizer = _read_tokenizer(path)
        settings = _read_settings(directory, tokenizer)
        names = (FILE, CONFIG, SPECIAL_TOKENS, TEMPLATE, GENERATION)
        files = tuple(directory / name for name in names if (directory / name).is_file())
        return cls(tokenizer, settings, source=str(path), files=files)

    def fingerprint(self) -> str:
        split = " split" if self._settings.split_special_tokens else ""
        return short_hash(f"{self._tokenizer.to_str()} {self.bos_id} {self.eos_id} {self.pad_id}{split}".encode())

    def save(self, directory: Path) -> None:
        """Copies the files it was read from, or writes tokenizer.json and tokenizer_config.json if it was built."""
        directory = Path(directory)
        for path in self._files:
            write_atomic(directory / path.name, path.read_bytes())
        names = {path.name for path in self._files}
        if FILE not in names:
            write_atomic(directory / FILE, self._tokenizer.to_str(pretty=True).encode())
            write_atomic(directory / CONFIG, _to_json(self._to_config()))
        kept = _read_json(directory / GENERATION) if GENERATION in names else {}
        if self._settings.stop_ids and not kept.get("eos_token_id"):
            # Stop tokens may come from config.json, which belongs to the model and is not copied.
            write_atomic(directory / GENERATION, _to_json(kept | {"eos_token_id": sorted(self.stop_ids)}))

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`; special tokens written in it become those tokens, unless `split_special_tokens` is set.

        Raises ValueError where the package fails, as for a regular expression of tokenizer.json that backtracks too
        often.
        """
        check_text(text)
        ids = _ids(self._tokenizer, text)
        begin = self._begin if bos else []
        return begin + ids + ([self.eos_id] if eos and self.eos_id is not None else [])

    def _encode_text(self, text: str, control: frozenset[int], begins: bool) -> list[int]:
        check_text(text)
        if self._text_backends is None or self._text_backends[0] != control:
            self._text_backends = (control, *text_backends(self._tokenizer, control))
        _, first, later = self._text_backends
        return _ids(first if begins else later, text)

    def marks(self) -> dict[int, Mark]:
        """The added tokens; begin, end, padding and stop tokens count as control tokens, marked special or not."""
        ends = {self.bos_id, self.eos_id, self.pad_id, *self.stop_ids} - {None}
        found = {
            token: Mark(spelling=added.content, control=added.special, lstrip=added.lstrip, rstrip=added.rstrip)
            for token, added in self._tokenizer.get_added_tokens_decoder().items()
        }
        for token in ends:
            assert token is not None
            mark = found.get(token) or Mark(spelling=self.spelling(token), control=False)
            if mark.spelling and not mark.is_word:
                found[token] = replace(mark, control=True)
        return found

    def spelling(self, token: int) -> str:
        """The token as the vocabulary writes it; "" for an id that the vocabulary leaves out."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token {token} is outside the vocabulary of {self.vocab_size}")
        return self._tokenizer.id_to_token(token) or ""

    def _find(self, field: str, source: str) -> int | None:
        token: str | None = getattr(self._settings, field)
        if token is None:
            return None
        found: int | None = self._tokenizer.token_to_id(token)
        if found is None and field != "pad_token":  # no text contains padding, so a vocabulary may lack it
            raise ValueError(f"{source}: {field}={token!r} is not in the vocabulary; download it again with {CONFIG}")
        return found

    def _to_config(self) -> dict[str, Any]:
        """tokenizer_config.json of a tokenizer that was built in memory."""
        fields = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self._settings.bos_token,
            "eos_token": self._settings.eos_token,
            "pad_token": self._settings.pad_token,
            "chat_template": self.chat_template,
            "split_special_tokens": self._settings.split_special_tokens or None,
            "clean_up_tokenization_spaces": False,
        }
        return {name: value for name, value in fields.items() if value is not None}


def _ids(backend: "tokenizers.Tokenizer", text: str) -> list[int]:
    """Ids of a text. A long one goes through the package's function for batches, which lets other threads run.

    Raises ValueError where the package fails.
    """
    with refused("the tokenizer cannot encode this text", "give another, or shorter pieces of it"):
        if len(text) > LONG:
            long: list[int] = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
            return long
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        return ids


def text_backends(
    backend: "tokenizers.Tokenizer", control: frozenset[int]
) -> "tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]":
    """(tokenizer for the beginning of a text, for text after a token): both read no token of `control`."""
    from tokenizers import Tokenizer as Backend

    state = json.loads(backend.to_str())
    for added in state["added_tokens"]:
        added["special"] = added["special"] or added["id"] in control
    built: list[tokenizers.Tokenizer] = []
    for begins in (True, False):
        if not begins:
            steps = state["pre_tokenizer"] or {}
            steps = steps.get("pretokenizers", [steps])
            spaced = [step for step in steps if step.get("prepend_scheme") == "first"]
            if not spaced:
                return built[0], built[0]
            for step in spaced:
                step["prepend_scheme"] = "never"
        found = Backend.from_str(json.dumps(state))
        found.encode_special_tokens = True
        built.append(found)
    return built[0], built[1]


def import_tokenizers() -> None:
    """Raises ValueError, saying what to install, where the package tokenizers is missing."""
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        raise ValueError(
            "this tokenizer needs the package tokenizers, which is not installed; pip install 'attnzoo[weights]'"
        ) from None


def _read_tokenizer(path: Path) -> "tokenizers.Tokenizer":
    if path.is_dir():
        raise ValueError(f"tokenizer '{path}' is a directory; give a file")
    if not path.is_file():
        raise ValueError(f"tokenizer '{path}' does not exist; give a directory with a {FILE}")
    import_tokenizers()
    from tokenizers import Tokenizer as Backend

    text = read_text(path, MAX_BYTES)
    what = f"'{path}' is not a tokenizer that the installed package tokenizers can read"
    with refused(what, "download it again, or update the package"):
        backend = Backend.from_str(text)
    _check_meaning(backend, parse_object(text, path), path)
    return backend


def _check_meaning(backend: "tokenizers.Tokenizer", content: dict[str, Any], path: Path) -> None:
    """Raises ValueError where the package reads other token ids than the file has, and for dropout."""
    for added in content.get("added_tokens", []):
        spelling, token = added["content"], backend.token_to_id(added["content"])
        if spelling and token != added["id"]:  # the package gives it the next free id without a word
            raise ValueError(
                f"{path}: the added token {spelling!r} has id {added['id']}, where the vocabulary has {token} or ends; "
                "download it again"
            )
    if dropout := getattr(backend.model, "dropout", None):
        raise ValueError(f"{path}: model.dropout={dropout} encodes a text differently each time; set it to null")


def _read_settings(directory: Path, tokenizer: "tokenizers.Tokenizer") -> TokenizerSettings:
    config = _read_json(directory / CONFIG)
    special = _read_json(directory / SPECIAL_TOKENS)
    spellings = {}
    for field in ("bos_token", "eos_token", "pad_token"):
        name, values = (CONFIG, config) if field in config else (SPECIAL_TOKENS, special)
        spellings[field] = _spelling(values.get(field), f"{directory / name}: {field}")
    stop_ids = _stop_ids(directory / GENERATION) or _stop_ids(directory / MODEL)
    if spellings["eos_token"] is None and stop_ids and 0 <= stop_ids[0] < 1 << 32:  # others are refused later
        spellings["eos_token"] = tokenizer.id_to_token(stop_ids[0])
    template = _template(config.get("chat_template"), directory / CONFIG)
    if (directory / TEMPLATE).exists():  # the newer place, which wins
        template = read_text(directory / TEMPLATE)
    return TokenizerSettings(
        **spellings,
        stop_ids=frozenset(stop_ids),
        chat_template=template,
        split_special_tokens=_flag(config, "split_special_tokens", directory / CONFIG),
    )


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is no such file."""
    try:
        return read_object(path)
    except FileNotFoundError:
        if path.is_symlink():
            raise ValueError(f"'{path}' is a link to a file that does not exist; download it again") from None
        return {}


def _to_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _spelling(value: Any, name: str) -> str | None:
    """The spelling of a token that is given as text, or as an object with "content" and flags."""
    spelling = value.get("content") if isinstance(value, dict) else value
    if not isinstance(spelling, str | None) or (value is not None and spelling is None):
        raise ValueError(f'{name}={value!r} must be text or an object with "content"')
    _check_utf8(spelling, name)
    return spelling


def _check_utf8(text: str | None, name: str) -> None:
    """Raises ValueError for lone surrogates, which JSON can hold and UTF-8 cannot."""
    try:
        check_text(text or "")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _template(value: Any, path: Path) -> str | None:
    """The chat template that is given as text, or as a list of named ones, of which "default" is for conversations."""
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    if not isinstance(value, str | None):
        raise ValueError(f'{path}: chat_template must be text or a list of {{"name", "template"}}, not {value!r}')
    _check_utf8(value, f"{path}: chat_template")
    return value


def _flag(config: dict[str, Any], field: str, path: Path) -> bool:
    value = config.get(field, False)
    if not isinstance(value, bool):
        raise ValueError(f"{path}: {field}={value!r} must be true or false")
    return value


def _stop_ids(path: Path) -> list[int]:
    value = _read_json(path).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token) is not int for token in ids):
        raise ValueError(f"{path}: eos_token_id={value!r} must be a number or a list of numbers")
    return ids


def _vocab_size(vocab: dict[str, int], source: str) -> int:
    if not vocab:
        raise ValueError(f"{source}: the vocabulary is empty; download it again")
    spelled: dict[int, str] = {}
    for token, number in vocab.items():
        if spelled.setdefault(number, token) != token:
            raise ValueError(f"{source}: {token!r} and {spelled[number]!r} have one id, {number}; download it again")
    last = max(vocab, key=lambda token: vocab[token])
    # Some ids may be left out, yet a table of all ids must stay in proportion to the file.
    if vocab[last] >= 2 * len(vocab) + 1024:
        raise ValueError(
            f"{source}: token {last!r} has id {vocab[last]} in a vocabulary of {len(vocab)} tokens; download it again"
        )
    return vocab[last] + 1


def _shrinks(tokenizer: "tokenizers.Tokenizer") -> float:
    """The factor by which normalisation may shorten a text, in bytes: 1 for rules that only rewrite spaces."""
    normalizer = json.loads(tokenizer.normalizer.__getstate__()) if tokenizer.normalizer is not None else None
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    bound = 1.0
    for step in steps:
        if step["type"] == "NFC":
            bound *= 3.0  # three letters of Hangul are one syllable
        elif step["type"] not in ("Prepend", "ByteLevel") and not (
            step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"]
        ):
            return float("inf")
    # An unknown token may stand for many characters, and characters without any token are dropped.
    byte_level = [step["type"] for step in decoder_steps(tokenizer)] == ["ByteLevel"]
    return bound if byte_level or getattr(tokenizer.model, "byte_fallback", False) else float("inf")


def _prefix(tokenizer: "tokenizers.Tokenizer", source: str) -> int | None:
    """The token that the post-processor puts before a text, found by encoding one with it and without."""
    with refused(f"{source}: the tokenizer cannot encode 'a'", "download it again"):
        whole: list[int] = tokenizer.encode("a", add_special_tokens=True).ids
        plain: list[int] = tokenizer.encode("a", add_special_tokens=False).ids
    at = next((n for n in range(len(whole)) if whole[n : n + len(plain)] == plain), 0)
    if at > 1:
        raise ValueError(
            f"{source}: texts begin with {at} special tokens ({whole[:at]}), but one at most is supported; "
            "use a checkpoint with one begin token"
        )
    return whole[0] if at else None
