"""Small tokenizers in the formats of others, and what must hold between ours and theirs."""

import json

from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "def read(path):\n    with open(path) as file:\n        return file.read()",
    "The quick brown fox jumps over the lazy dog, 1234 times; 'tis what it's.",
    "naïve café, Grüße; Ελληνικά, кириллица, 中文字符, 日本語, עברית",
    "emoji \U0001f600 and families \U0001f468\u200d\U0001f469\u200d\U0001f467, flags \U0001f1e9\U0001f1ea",
    "aaaa aaaaaa abababab  two   spaces    and more\t\ttabs\r\n\n",
] * 8
TEXTS = [
    "",
    " ",
    "Hello",
    " leading",
    "  two  spaces  ",
    "x = [1, 23, 456, 7890]  # 100% of 3.14",
    "\n\n    return None\r\n\tpass",
    "naïve e\u0301 \ufb01 \uff21 \u00a0",
    "中文 日本語 한국어 עברית",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \ue000 \U0010ffff",
    "it's they'LL We'Ve",
    "<s>in</s> <think>text</think> <|user|>",
    "0x41 <0x41> <0xzz>",
]
CHARACTERS = st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\tab中\U0001f6001'"))
ANY_TEXT = st.text(CHARACTERS)
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>"]
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True, "normalized": False},
}


def write(directory, backend, **config):
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(CONFIG | config), encoding="utf-8")
    return directory


def begin_with_bos(backend):
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )


def train(backend, **options):
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=700, show_progress=False, **options))


def byte_level():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    train(backend, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    return backend


def spaced():
    """As Llama 2's: a space before the text, U+2581 for a space, bytes for characters without a token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    train(backend)
    trained = json.loads(backend.to_str())["model"]
    tokens = [*SPECIAL[:3], *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [token for token in trained["vocab"] if token != "字"]  # one character has to do with bytes
    merges = [tuple(merge) for merge in trained["merges"] if "字" not in "".join(merge)]
    vocab = {token: number for number, token in enumerate(t for t in tokens if "字" not in t)}
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def train_sentencepiece(path, **options):
    standard = {
        "model_type": "bpe", "vocab_size": 420, "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "minloglevel": 2,
    }  # fmt: skip
    lines = [line for text in CORPUS for line in text.splitlines() if line]
    SentencePieceTrainer.train(sentence_iterator=iter(lines), model_prefix=str(path), **(standard | options))
    return path.with_suffix(".model")


def stream(tokenizer, ids, **options):
    decoder = tokenizer.decoder(**options)
    return "".join(map(decoder.push, ids)) + decoder.finish()


def check_against(ours, theirs, text):
    ids = ours.encode(text, bos=True)
    assert ids == theirs.encode(text), text
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
    assert ours.decode(ids) == stream(ours, ids) == theirs.decode(ids, skip_special_tokens=True), text
    assert ours.decode(ids, start=False) == stream(ours, ids, start=False)


def check_same(one, other):
    names = ("vocab_size", "bos_id", "eos_id", "pad_id", "stop_ids", "chat_template", "strips_first_space")
    assert [getattr(one, name) for name in names] == [getattr(other, name) for name in names]
    assert all(one.token_bytes(n) == other.token_bytes(n) for n in range(one.vocab_size))
    assert all(one.spelling(n) == other.spelling(n) for n in range(one.vocab_size))
    for text in TEXTS:
        assert one.encode(text, bos=True, eos=True) == other.encode(text, bos=True, eos=True)


MARKS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]"]
MARKS += ["<|user|>", "<|assistant|>", "<|system|>"]
"""Control tokens of the chat templates in `tests.helpers.chat_templates`."""


def with_marks(backend):
    """A tokenizer that reads them, and a few tokens more, out of any text."""
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in [*SPECIAL, *MARKS]])
    backend.add_special_tokens([AddedToken("<|end|>", normalized=False, rstrip=True)])
    backend.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", "</think>", "<table>", "    ")])
    return backend
