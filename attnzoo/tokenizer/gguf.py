"""The tokenizer inside a GGUF file, built from its metadata.

"gpt2" vocabularies are byte-level BPE: the file has tokens and merges, and only the name of the rule that cuts text
into words (`tokenizer.ggml.pre`). "llama" vocabularies are sentencepiece BPE: the file has scores instead of merges,
and the pair whose merged token has the best score is merged first.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnzoo.errors import suggest
from attnzoo.gguf_file import read_gguf
from attnzoo.tokenizer.base import refused
from attnzoo.tokenizer.byte_table import SPACE
from attnzoo.tokenizer.huggingface import HuggingFaceTokenizer, TokenizerSettings, import_tokenizers

if TYPE_CHECKING:
    import tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""Token types that matter here; unused (5) and byte (6) tokens are spelled like any other."""

MAX_TOKEN = 1024
"""Largest number of characters of a token, because every way to cut a token in two is tried."""
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


@dataclass(frozen=True, kw_only=True)
class Words:
    """How text is cut into words before merging: by one regular expression after the other; each match is a word.

    nfc: whether text is normalised to NFC first. whole_words: whether a word that is a token skips merging. add_bos:
    whether texts begin with the begin token where the file does not say.
    """

    splits: tuple[str, ...]
    nfc: bool = False
    whole_words: bool = False
    add_bos: bool = False


WORDS = {
    "gpt-2": Words(splits=(GPT2,)),
    "smollm": Words(splits=(r"\p{N}", GPT2)),
    "llama-bpe": Words(
        splits=(rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{TAIL}",),
        whole_words=True,
        add_bos=True,
    ),
    # The file does not mention it, but the vocabulary was trained on text in NFC.
    "qwen2": Words(splits=(rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{TAIL}",), nfc=True),
    # What llama.cpp, which defines these names, does for a file whose converter did not know the rule.
    "default": Words(splits=(r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}


def load_gguf_tokenizer(path: Path) -> HuggingFaceTokenizer:
    """The tokenizer of a GGUF file. Raises ValueError, naming file and field, for what is missing or not supported."""
    path = Path(path)
    fields = _TokenizerFields(read_gguf(path).metadata, path)
    import_tokenizers()
    model = fields.get("model", str)
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if model not in builders:
        raise ValueError(f"'{path}': unknown tokenizer.ggml.model {model!r}{suggest(model, builders)}")
    tokens = fields.values("tokens", str)
    longest = max(tokens, key=len, default="")
    if len(longest) > MAX_TOKEN:
        raise ValueError(f"'{path}': tokenizer.ggml.tokens has one of {len(longest)} characters; at most {MAX_TOKEN}")
    token, count = Counter(tokens).most_common(1)[0] if tokens else ("", 0)
    if count != 1:
        raise ValueError(
            f"'{path}': token {token!r} is in tokenizer.ggml.tokens {count} times; convert the model again"
        )
    backend, add_bos = builders[model](fields, tokens)
    _add_special_tokens(backend, fields, tokens)
    bos = fields.token("bos_token_id", tokens)
    if fields.get("add_bos_token", bool, add_bos) and bos is not None:
        _begin_with(backend, bos)
    settings = TokenizerSettings(
        bos_token=bos,
        eos_token=fields.token("eos_token_id", tokens),
        pad_token=fields.token("padding_token_id", tokens),
        # The ends of a turn, where a file knows them: a reply ends there too.
        stop_ids=frozenset(
            fields.get(name, int) for name in ("eos_token_id", "eot_token_id", "eom_token_id") if fields.has(name)
        ),
        chat_template=fields.template(),
    )
    return HuggingFaceTokenizer(backend, settings, source=str(path))


class _TokenizerFields:
    """The metadata under tokenizer.ggml, with errors that name file and field."""

    def __init__(self, metadata: dict[str, Any], path: Path) -> None:
        self.metadata = metadata
        self.path = path

    def has(self, name: str) -> bool:
        return f"tokenizer.ggml.{name}" in self.metadata

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        """A field of type `kind`, `default` where it is absent. Raises ValueError without a default, or for another
        type."""
        value = self.metadata.get(f"tokenizer.ggml.{name}", default)
        if type(value) is not kind:
            found = "missing" if value is None else f"{type(value).__name__}, not {kind.__name__}"
            raise ValueError(f"'{self.path}': tokenizer.ggml.{name} is {found}; convert the model again")
        return value

    def template(self) -> str | None:
        """The chat template, None where there is none."""
        template = self.metadata.get("tokenizer.chat_template")
        if not isinstance(template, str | None):
            raise ValueError(f"'{self.path}': tokenizer.chat_template is not text; convert the model again")
        return template

    def values(self, name: str, kind: type) -> list[Any]:
        """A list of values of one kind."""
        values: list[Any] = self.get(name, list)
        wrong = next((value for value in values if type(value) is not kind), None)
        if wrong is not None:
            raise ValueError(
                f"'{self.path}': tokenizer.ggml.{name} holds {type(wrong).__name__}, not {kind.__name__}; "
                "convert the model again"
            )
        return values

    def array(self, name: str, kind: type, size: int) -> list[Any]:
        """A list with one value for each token."""
        values = self.values(name, kind)
        if len(values) != size:
            raise ValueError(
                f"'{self.path}': tokenizer.ggml.{name} has {len(values)} values for {size} tokens; "
                "convert the model again"
            )
        return values

    def token(self, name: str, tokens: list[str]) -> str | None:
        """The token that a field points at; None where it is absent."""
        if not self.has(name):
            return None
        number: int = self.get(name, int)
        if not 0 <= number < len(tokens):
            raise ValueError(
                f"'{self.path}': tokenizer.ggml.{name}={number} is outside the vocabulary of {len(tokens)}; "
                "convert the model again"
            )
        return tokens[number]


def _byte_level(fields: _TokenizerFields, tokens: list[str]) -> tuple["tokenizers.Tokenizer", bool]:
    """(byte-level BPE, whether texts begin with the begin token where the file does not say)."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    name = fields.get("pre", str)
    if name not in WORDS:
        raise ValueError(f"'{fields.path}': unknown tokenizer.ggml.pre {name!r}{suggest(name, WORDS)}")
    words = WORDS[name]
    merges = [tuple(merge.split(" ")) for merge in fields.values("merges", str)]
    backend = _bpe(fields.path, tokens, merges, ignore_merges=words.whole_words)
    if words.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), behavior="isolated") for split in words.splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, words.add_bos


def _sentencepiece(fields: _TokenizerFields, tokens: list[str]) -> tuple["tokenizers.Tokenizer", bool]:
    """(sentencepiece BPE, True: its texts begin with the begin token where the file does not say otherwise)."""
    from tokenizers import decoders, normalizers

    kinds = fields.array("token_type", int, len(tokens))
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN), None)
    backend = _bpe(
        fields.path,
        tokens,
        merges_by_score(tokens, fields.array("scores", float, len(tokens)), kinds),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    prefix = fields.get("add_space_prefix", bool, True)
    spaces = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend, True


def merges_by_score(tokens: list[str], scores: list[float], kinds: list[int]) -> list[tuple[str, str]]:
    """Every way to merge two normal tokens into one, the token with the best score first."""
    normal = {
        token: (-score, number)
        for number, (token, score, kind) in enumerate(zip(tokens, scores, kinds, strict=True))
        if kind == NORMAL
    }
    merges = []
    for token in sorted(normal, key=normal.__getitem__):
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        merges += [(left, right) for left, right in pairs if left in normal and right in normal]
    return merges


def _bpe(path: Path, tokens: list[str], merges: list[Any], **options: Any) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE

    vocab = {token: number for number, token in enumerate(tokens)}
    what = f"'{path}': tokenizer.ggml.merges do not fit tokenizer.ggml.tokens"
    for merge in merges:
        if len(merge) != 2 or not vocab.keys() >= {*merge, "".join(merge)}:
            raise ValueError(
                f"{what} ({' '.join(merge)!r} is not two tokens that make a third); convert the model again"
            )
    with refused(what, "convert the model again"):
        return Backend(BPE(vocab=vocab, merges=merges, **options))


def _add_special_tokens(backend: "tokenizers.Tokenizer", fields: _TokenizerFields, tokens: list[str]) -> None:
    from tokenizers import AddedToken

    kinds = fields.array("token_type", int, len(tokens))
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (UNKNOWN, CONTROL):
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False, special=False)])


def _begin_with(backend: "tokenizers.Tokenizer", bos: str) -> None:
    from tokenizers.processors import TemplateProcessing

    backend.post_processor = TemplateProcessing(
        single=[f"{bos}:0", "$A:0"],
        pair=[f"{bos}:0", "$A:0", f"{bos}:1", "$B:1"],
        special_tokens=[(bos, backend.token_to_id(bos))],
    )
