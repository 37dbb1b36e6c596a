"""Tokenizers of others: ids and texts are those of tokenizers, transformers and sentencepiece, byte for byte."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from attnzoo.tokenizer import (
    ForeignSentencePieceTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    TokenizerSettings,
    load_tokenizer,
)
from attnzoo.tokenizer.huggingface import LONG
from tests.helpers.foreign_tokenizers import (
    ANY_TEXT,
    CONFIG,
    CORPUS,
    SPECIAL,
    TEXTS,
    begin_with_bos,
    byte_level,
    check_against,
    check_same,
    spaced,
    stream,
    train_sentencepiece,
    write,
)


@pytest.fixture(scope="module", params=[byte_level, spaced], ids=["byte level", "spaced"])
def pair(request, tmp_path_factory):
    """(ours, transformers') from the same directory."""
    backend = request.param()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    begin_with_bos(backend)
    directory = write(tmp_path_factory.mktemp("tokenizer"), backend)
    return load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("text", TEXTS + CORPUS[:5])
def test_ids_and_texts_are_those_of_transformers(pair, text):
    check_against(*pair, text)


@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT)
def test_any_text_is_encoded_as_transformers_does(pair, text):
    check_against(*pair, text)
    ours, _ = pair
    lost = [*SPECIAL, "\u2581"] if ours.strips_first_space else SPECIAL
    if not any(part in text for part in lost):
        assert ours.decode(ours.encode(text)) == text


def test_a_long_text_is_encoded_as_a_short_one_is(pair):
    """It takes another way through the package, on which other threads run meanwhile."""
    ours, theirs = pair
    text = "Der Zustand, <s>the state: 数据 🙂 x" * 800
    assert len(text) > LONG
    assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 263) | st.integers(0, 470), max_size=12))
@example([3 + 0xE4, 3 + 0xB8, 264])  # a character that is never completed
def test_any_ids_stream_as_they_decode(pair, ids):
    ours, theirs = pair
    text = ours.decode(ids)
    assert stream(ours, ids) == text
    expected = theirs.backend_tokenizer.decode(ids, skip_special_tokens=True)
    # Bytes that are no UTF-8: the byte fallback of tokenizers replaces the valid ones beside them too.
    if "\ufffd" not in expected or not ours.strips_first_space:
        assert text == expected


def test_characters_appear_when_they_are_whole(pair):
    ours, _ = pair
    ids = ours.encode("\U0001f6ff")  # not in the corpus
    decoder = ours.decoder()
    texts = [decoder.push(token) for token in ids]
    assert len(ids) >= 3
    assert texts == [""] * (len(ids) - 1) + ["\U0001f6ff"]
    decoder.push(ids[-2])
    assert decoder.finish() in ("\ufffd", "")


def test_special_tokens(pair):
    ours, _ = pair
    assert (ours.spelling(ours.bos_id), ours.spelling(ours.eos_id), ours.pad_id) == ("<s>", "</s>", None)
    assert ours.stop_ids == {ours.eos_id}
    ids = ours.encode("<s>fox<|user|>", bos=True, eos=True)
    assert [ids[0], ids[1], ids[-1]] == [ours.bos_id, ours.bos_id, ours.eos_id]
    assert ours.decode(ids) == "fox"
    (think,) = ours.encode("<think>")[-1:]
    assert ours.token_bytes(think) == b"<think>"
    assert {ours.token_bytes(ours.encode(token)[-1]) for token in SPECIAL} == {b""}
    for token in (-1, ours.vocab_size):
        with pytest.raises(ValueError, match=f"token {token} is outside the vocabulary"):
            ours.decode([token])
    with pytest.raises(ValueError, match="lone surrogate"):
        ours.encode("\ud800")


def test_first_space(pair):
    """The space before a text is encoding's own; that of a continuation is not."""
    ours, _ = pair
    ids = ours.encode("fox")
    assert ours.decode(ids) == "fox"
    assert ours.decode(ids, start=False) == (" fox" if ours.strips_first_space else "fox")
    assert ours.decode([ours.bos_id, *ours.encode(" a")]) == " a"


def test_added_tokens_stand_for_the_text_they_were_found_in():
    backend = byte_level()
    backend.add_tokens(["\u00e9t\u00e9", "  \t"])
    ours = HuggingFaceTokenizer(backend, TokenizerSettings(), source="built")
    assert len(ours.encode("\u00e9t\u00e9")) == 1
    assert ours.decode(ours.encode("un \u00e9t\u00e9  \t")) == "un \u00e9t\u00e9  \t"


@pytest.mark.parametrize(
    ("adds", "config", "expected"),
    [
        (True, {}, True),
        (False, {}, False),
        (False, {"bos_token": None}, False),
        (True, {"bos_token": None}, True),
        (False, {"add_bos_token": True}, False),
        (True, {"add_bos_token": False}, True),
    ],
)
def test_begin_token_only_where_the_model_has_it(tmp_path, adds, config, expected):
    backend = byte_level()
    backend.add_special_tokens(SPECIAL)
    if adds:
        begin_with_bos(backend)
    directory = write(tmp_path, backend, **config)
    ours = load_tokenizer(directory)
    assert (ours.encode("a", bos=True)[:1] == [backend.token_to_id("<s>")]) == expected
    assert ours.encode("a", bos=True) == AutoTokenizer.from_pretrained(directory).encode("a")
    assert ours.encode("a") == backend.encode("a", add_special_tokens=False).ids


def test_templates_and_stop_tokens(pair, tmp_path):
    source = Path(pair[0]._files[0]).parent
    directory = shutil.copytree(source, tmp_path / "a")
    user = pair[0].encode("<|user|>")[-1]
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    for value, template in [("text", "text"), (named, "D"), (named[:1], None)]:
        (directory / "tokenizer_config.json").write_text(json.dumps(CONFIG | {"chat_template": value}))
        assert load_tokenizer(directory).chat_template == template
    (directory / "chat_template.jinja").write_text("{{ 'ü' }}", encoding="utf-8")
    (directory / "config.json").write_text(json.dumps({"eos_token_id": [user]}))
    tokenizer = load_tokenizer(directory)
    assert tokenizer.chat_template == "{{ 'ü' }}"
    assert tokenizer.stop_ids == {tokenizer.eos_id, user}
    tokenizer.save(tmp_path / "b")
    assert not (tmp_path / "b" / "config.json").exists()
    check_same(load_tokenizer(tmp_path / "b"), tokenizer)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.bos_id}))
    assert load_tokenizer(directory).stop_ids == {tokenizer.eos_id, tokenizer.bos_id}
    # Beside a file that says how to sample and nothing of ends, those of config.json stay.
    for number, kept in enumerate(({"temperature": 0.6}, {"eos_token_id": []})):
        (directory / "generation_config.json").write_text(json.dumps(kept))
        load_tokenizer(directory).save(tmp_path / f"c{number}")
        check_same(load_tokenizer(tmp_path / f"c{number}"), tokenizer)
        saved = json.loads((tmp_path / f"c{number}" / "generation_config.json").read_text())
        assert saved == kept | {"eos_token_id": sorted(tokenizer.stop_ids)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["added_tokens"][-1].update(id=9),
            r"the added token '<think>' has id 9, where the vocabulary has",
        ),
        (lambda c: c["added_tokens"][-1].update(id=10**6), r"the added token '<think>' has id 1000000, where"),
        (
            lambda c: c["model"].update(dropout=0.5),
            r"model.dropout=0.5 encodes a text differently each time; set it to null",
        ),
        (
            lambda c: (c["added_tokens"].clear(), c["model"]["vocab"].update(zz=5)),
            r"'.*' and '.*' have one id, 5; download",
        ),
    ],
)
def test_a_vocabulary_means_what_it_says(pair, change, message, tmp_path):
    """The package takes each of these without a word, and gives other ids than the file."""
    directory = shutil.copytree(Path(pair[0]._files[0]).parent, tmp_path / "copy")
    content = json.loads((directory / "tokenizer.json").read_text())
    change(content)
    (directory / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"tokenizer.json: {message}"):
        load_tokenizer(directory)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json' is not a tokenizer that the installed package"),
        ("tokenizer.json", b"\xff", "tokenizer.json' is not UTF-8"),
        ("tokenizer_config.json", "{", "tokenizer_config.json' is not JSON"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json' holds a list, not an object"),
        ("tokenizer_config.json", b"\xff", "tokenizer_config.json' is not UTF-8"),
        ("tokenizer_config.json", '{"bos_token": 1}', 'bos_token=1 must be text or an object with "content"'),
        ("tokenizer_config.json", '{"eos_token": "<e>"}', "eos_token='<e>' is not in the vocabulary"),
        ("tokenizer_config.json", '{"chat_template": 1}', "chat_template must be text or a list"),
        ("generation_config.json", '{"eos_token_id": "2"}', "eos_token_id='2' must be a number or a list"),
        ("generation_config.json", '{"eos_token_id": 9999}', "stop token 9999 is outside the vocabulary of"),
        ("generation_config.json", '{"eos_token_id": -1}', "stop token -1 is outside the vocabulary of"),
        ("tokenizer_config.json", '{"bos_token": "\\ud800"}', "bos_token: text holds a lone surrogate"),
        ("tokenizer_config.json", '{"chat_template": "\\ud800"}', "chat_template: text holds a lone surrogate"),
    ],
)
def test_damaged_files_are_named(pair, tmp_path, name, content, message):
    directory = shutil.copytree(Path(pair[0]._files[0]).parent, tmp_path / "copy")
    (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        load_tokenizer(directory)


def test_an_expression_that_gives_up_is_an_error_of_the_text():
    """The package panics, which is no Exception and would end whatever thread encodes."""
    backend = byte_level()
    split = pre_tokenizers.Split(Regex("(a+)+b"), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer = HuggingFaceTokenizer(backend, TokenizerSettings(), source="built")
    with pytest.raises(ValueError, match=r"cannot encode this text .*retry-limit-in-match over.*; give another"):
        tokenizer.encode("a" * 100)
    assert tokenizer.decode(tokenizer.encode("aab")) == "aab"


@pytest.mark.parametrize(
    "text", ["", "\0", "\0" * 1000, "\ufeffa", "\u2028\u2029\x85", "\u202e\u200b", "e" + "\u0301" * 5000]
)
def test_odd_texts_come_back(pair, text):
    assert pair[0].decode(pair[0].encode(text)) == text


def test_unsuitable_vocabularies_are_refused():
    def refused(backend, message):
        with pytest.raises(ValueError, match=message):
            HuggingFaceTokenizer(backend, TokenizerSettings(), source="built")

    backend = byte_level()
    backend.decoder = decoders.WordPiece()
    refused(backend, "built: decoder .*WordPiece.* is not supported; known: ByteLevel, Replace.ByteFallback")
    backend.decoder = decoders.Sequence([decoders.Replace("_", " "), decoders.ByteFallback(), decoders.Fuse()])
    refused(backend, "Replace.* is not supported")
    backend.decoder = None
    refused(backend, "decoder None is not supported")
    refused(Tokenizer(models.BPE()), "built: the vocabulary is empty")
    refused(Tokenizer(models.BPE({"a": 0, "b": 10**9}, [])), "token 'b' has id 1000000000 in a vocabulary of 2 tokens")
    backend = byte_level()
    backend.add_special_tokens(SPECIAL)
    backend.post_processor = processors.TemplateProcessing("<s> <|user|> $A", None, [("<s>", 1), ("<|user|>", 2)])
    refused(backend, "texts begin with 2 special tokens")


def test_ids_that_the_vocabulary_leaves_out_stand_for_nothing():
    backend = Tokenizer(models.BPE({"a": 0, "b": 5}, []))
    backend.decoder = decoders.ByteLevel()
    ours = HuggingFaceTokenizer(backend, TokenizerSettings(), source="built")
    assert ours.vocab_size == 6
    assert (ours.decode([0, 3, 5]), ours.spelling(3)) == ("ab", "")


def test_paths_that_hold_no_tokenizer(tmp_path, monkeypatch, pair):
    with pytest.raises(ValueError, match=r"holds neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"none' does not exist; give a directory with tokenizer.json or tokenizer.mo"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "vocab.txt").touch()
    with pytest.raises(ValueError, match=r"vocab.txt' is not a tokenizer by its name"):
        load_tokenizer(tmp_path / "vocab.txt")
    with pytest.raises(ValueError, match=r"tokenizer.json' does not exist"):
        HuggingFaceTokenizer.load(tmp_path)
    check_same(load_tokenizer(pair[0]._files[0]), pair[0])
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"pip install 'attnzoo\[weights\]'"):
        load_tokenizer(pair[0]._files[0].parent)


# sentencepiece models of others


FLAVOURS = {
    "llama": {},
    "no byte fallback": {"byte_fallback": False, "vocab_size": 120},
    "rules and trimming": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "unigram": {"model_type": "unigram", "vocab_size": 350},
    "no first space": {"add_dummy_prefix": False},
}


@pytest.fixture(scope="module", params=FLAVOURS.values(), ids=FLAVOURS)
def foreign(request, tmp_path_factory):
    """(ours, sentencepiece's) of the same file."""
    path = train_sentencepiece(tmp_path_factory.mktemp("foreign") / "tokenizer", **request.param)
    return load_tokenizer(path.parent), SentencePieceProcessor(model_file=str(path))


def check_sentencepiece(ours, processor, text):
    ids = ours.encode(text, bos=True, eos=True)
    assert ids == [processor.bos_id(), *processor.encode(text), processor.eos_id()]
    assert ours.decode(ids) == stream(ours, ids) == processor.decode(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_foreign_models_decode_as_sentencepiece_does(foreign, text):
    check_sentencepiece(*foreign, text)


@settings(max_examples=100, deadline=None)
@given(text=ANY_TEXT)
def test_foreign_models_decode_any_text_as_sentencepiece_does(foreign, text):
    check_sentencepiece(*foreign, text)


def test_foreign_model(foreign, tmp_path):
    ours, processor = foreign
    assert isinstance(ours, ForeignSentencePieceTokenizer)
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.stop_ids) == (1, 2, None, {2})
    assert (ours.chat_template, ours.spelling(2)) == (None, "</s>")
    assert ours.strips_first_space == processor.encode("a", out_type=str)[0].startswith("\u2581")
    ours.save(tmp_path)
    check_same(load_tokenizer(tmp_path / "tokenizer.model"), ours)
    with pytest.raises(ValueError, match="token -1 is outside the vocabulary"):
        ours.decode([-1])


def test_own_models_are_told_from_foreign_ones(tmp_path):
    own = {"add_dummy_prefix": False, "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    train_sentencepiece(tmp_path / "tokenizer", **own)
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
    (tmp_path / "tokenizer.model").write_bytes(b"none")
    with pytest.raises(ValueError, match="is not a sentencepiece model"):
        load_tokenizer(tmp_path)
