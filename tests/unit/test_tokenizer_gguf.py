"""Tokenizers inside GGUF files: ids are those of the checkpoint's own tokenizer and of sentencepiece."""

import json
import struct

import pytest
from gguf import GGUFReader, GGUFWriter
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from attnzoo.gguf_file import read_gguf
from attnzoo.tokenizer import load_tokenizer
from tests.helpers.foreign_tokenizers import (
    ANY_TEXT,
    CORPUS,
    TEXTS,
    byte_level,
    check_against,
    check_same,
    stream,
    train_sentencepiece,
)
from tests.helpers.gguf_files import smollm2, write_metadata

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


@pytest.fixture(scope="module")
def smollm_pair():
    """(ours, transformers') of SmolLM2's GGUF file."""
    path = smollm2()
    return load_tokenizer(path), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.fixture(scope="module")
def smollm_own(smollm_pair):
    """SmolLM2's vocabulary with its own pre-tokenizer. Reading the file, transformers does not cut digits one by one,
    and so takes the last of several spaces apart where a digit follows."""
    backend = Tokenizer.from_str(smollm_pair[1].backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return backend


SMOLLM_TEXTS = [*TEXTS, *CORPUS[:5], "<|im_start|>user\nHi 42<|im_end|>\n", "<|endoftext|><|im_end|>", "a\u0300 1a2b"]


@pytest.mark.heavy
@pytest.mark.parametrize("text", SMOLLM_TEXTS)
def test_smollm_has_the_ids_of_transformers(smollm_pair, text):
    check_against(*smollm_pair, text)


@pytest.mark.heavy
@settings(max_examples=200, deadline=None)
@given(text=ANY_TEXT)
@example("one  2   34")
def test_smollm_on_any_text(smollm_pair, smollm_own, text):
    ours, _ = smollm_pair
    ids = ours.encode(text, bos=True)
    assert ids == smollm_own.encode(text).ids
    assert ours.decode(ids) == stream(ours, ids) == smollm_own.decode(ids)


def test_smollm_settings(smollm_pair, tmp_path):
    ours, theirs = smollm_pair
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.pad_id) == (49152, 1, 2, 2)
    assert ours.stop_ids == {2}
    assert ours.chat_template == theirs.chat_template
    ours.save(tmp_path)
    check_same(load_tokenizer(tmp_path), ours)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == ours.chat_template
    for text in [*SMOLLM_TEXTS, "one  2   34"]:
        check_against(ours, again, text)


# Byte-level vocabularies


@pytest.fixture(scope="module")
def vocabulary():
    """The fields of a small byte-level vocabulary: two control tokens and one that is added but not special."""
    model = json.loads(byte_level().to_str())["model"]
    tokens = ["<s>", "</s>", "<|eot|>", "<think>", *model["vocab"]]
    kinds = [CONTROL] * 3 + [USER_DEFINED] + [NORMAL] * len(model["vocab"])
    return {
        "model": "gpt2",
        "tokens": tokens,
        "token_type": kinds,
        "merges": [" ".join(merge) for merge in model["merges"]],
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def words(name):
    """(normalizer, pre-tokenizer) as the tokenizer.json of such checkpoints has them."""
    if name == "gpt-2":
        return None, pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), behavior="isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return normalizers.NFC() if name == "qwen2" else None, pre_tokenizers.Sequence([split, bytes_only])


@pytest.fixture(scope="module", params=["gpt-2", "llama-bpe", "qwen2"])
def named(request, vocabulary, tmp_path_factory):
    """(ours, a tokenizer with the same vocabulary and the words of `name`)."""
    ours = load_tokenizer(write_metadata(tmp_path_factory.mktemp("g") / "m.gguf", arrays=vocabulary, pre=request.param))
    backend = Tokenizer.from_str(ours._tokenizer.to_str())
    backend.normalizer, backend.pre_tokenizer = words(request.param)
    backend.model.ignore_merges = request.param == "llama-bpe"
    return ours, backend


@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT)
@example("it's WE'LL 12345  67 a\u0300\r\n\n  x<think></s>")
def test_words_are_cut_as_the_name_says(named, text):
    ours, backend = named
    assert ours.encode(text) == backend.encode(text, add_special_tokens=False).ids
    assert ours.decode(ours.encode(text)) == backend.decode(ours.encode(text))


def test_default_words(vocabulary, tmp_path):
    ours = load_tokenizer(write_metadata(tmp_path / "m.gguf", arrays=vocabulary, pre="default"))
    cut = ours._tokenizer.pre_tokenizer.pre_tokenize_str("a.b 12345")
    assert [word for word, _ in cut] == ["a", ".", "b", "\u0120", "123", "45"]


def test_a_word_that_is_a_token_needs_no_merges_in_llama_3(vocabulary, tmp_path):
    tokens = [*vocabulary["tokens"], "zqzqz"]
    arrays = vocabulary | {"tokens": tokens, "token_type": [*vocabulary["token_type"], NORMAL]}
    for pre, whole in [("llama-bpe", True), ("gpt-2", False)]:
        ours = load_tokenizer(write_metadata(tmp_path / "m.gguf", arrays=arrays, pre=pre))
        assert (ours.encode("zqzqz") == [len(tokens) - 1]) == whole


def test_begin_and_stop_tokens(vocabulary, tmp_path):
    def load(**fields):
        return load_tokenizer(write_metadata(tmp_path / "m.gguf", arrays=vocabulary, **fields))

    assert load(pre="llama-bpe").encode("a", bos=True)[0] == 0
    assert 0 not in load(pre="llama-bpe", add_bos_token=False).encode("a", bos=True)
    assert 0 not in load(pre="gpt-2").encode("a", bos=True)
    ours = load(pre="gpt-2", add_bos_token=True, eot_token_id=2, padding_token_id=2, chat_template="T")
    assert ours.encode("a", bos=True, eos=True) == [0, *ours.encode("a"), 1]
    assert (ours.stop_ids, ours.pad_id, ours.chat_template) == ({1, 2}, 2, "T")
    assert ours.decode(ours.encode("<s>a<think>b<|eot|>")) == "a<think>b"
    ours.save(tmp_path / "saved")
    check_same(load_tokenizer(tmp_path / "saved"), ours)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pre": "smolllm"},
            r"m.gguf': unknown tokenizer.ggml.pre 'smolllm'; did you mean 'smollm'\? known: default, gp",
        ),
        ({"pre": None}, r"m.gguf': tokenizer.ggml.pre is missing"),
        ({"model": "bert"}, r"unknown tokenizer.ggml.model 'bert'; known: gpt2, llama"),
        ({"tokens": None}, r"tokenizer.ggml.tokens is missing"),
        ({"tokens": "a"}, r"tokenizer.ggml.tokens is str, not list"),
        ({"token_type": [1, 1]}, r"tokenizer.ggml.token_type has 2 values for \d+ tokens"),
        ({"merges": ["a 1 2"]}, r"tokenizer.ggml.merges do not fit tokenizer.ggml.tokens"),
        ({"merges": ["\u4e2d x"]}, r"tokenizer.ggml.merges do not fit tokenizer.ggml.tokens"),
        ({"merges": [1, 2]}, r"tokenizer.ggml.merges holds int, not str"),
        ({"tokens": [1, 2]}, r"tokenizer.ggml.tokens holds int, not str"),
        ({"tokens": ["a" * 2000, "b"]}, r"tokenizer.ggml.tokens has one of 2000 characters; at most 1024"),
        ({"token_type": ["x"]}, r"tokenizer.ggml.token_type holds str, not int"),
        ({"model": "llama", "scores": ["x"]}, r"tokenizer.ggml.scores holds str, not float"),
        ({"bos_token_id": 9999}, r"tokenizer.ggml.bos_token_id=9999 is outside the vocabulary"),
        ({"eot_token_id": 9999}, r"stop token 9999 is outside the vocabulary"),
        ({"chat_template": 1}, r"tokenizer.chat_template is not text"),
        ({"model": "llama"}, r"tokenizer.ggml.scores is missing"),
    ],
)
def test_unsuitable_fields_are_named(vocabulary, tmp_path, changes, message):
    fields = {name: value for name, value in (vocabulary | {"pre": "gpt-2"} | changes).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        load_tokenizer(write_metadata(tmp_path / "m.gguf", arrays=fields))


def test_a_token_that_is_there_twice_is_named(vocabulary, tmp_path):
    tokens = [*vocabulary["tokens"][:-1], "<think>"]
    with pytest.raises(ValueError, match=r"token '<think>' is in tokenizer.ggml.tokens 2 times"):
        load_tokenizer(write_metadata(tmp_path / "m.gguf", arrays=vocabulary | {"tokens": tokens}, pre="gpt-2"))


# Sentencepiece vocabularies


@pytest.fixture(scope="module", params=[True, False], ids=["first space", "no first space"])
def spm(request, tmp_path_factory):
    """(ours, from a GGUF file; the sentencepiece model that the file was written from)."""
    directory = tmp_path_factory.mktemp("spm")
    model = train_sentencepiece(directory / "tokenizer", vocab_size=560, add_dummy_prefix=request.param)
    processor = SentencePieceProcessor(model_file=str(model))

    def kind(token):
        kinds = {UNKNOWN: processor.is_unknown, CONTROL: processor.is_control, BYTE: processor.is_byte}
        return next((kind for kind, holds in kinds.items() if holds(token)), NORMAL)

    every = range(processor.get_piece_size())
    arrays = {
        "model": "llama",
        "tokens": [processor.id_to_piece(token) for token in every],
        "scores": [processor.get_score(token) for token in every],
        "token_type": [kind(token) for token in every],
        "bos_token_id": processor.bos_id(),
        "eos_token_id": processor.eos_id(),
        "add_space_prefix": request.param,
    }
    return load_tokenizer(write_metadata(directory / "m.gguf", arrays=arrays)), processor


# Runs and periods are where the order of merges shows. "<" might spell a special token, which sentencepiece does not
# look for.
REPEATING = st.text("ab \u2581t", max_size=40) | st.lists(st.sampled_from(["a", "ab", " ", "  ", "ba"])).map("".join)


@settings(max_examples=400, deadline=None)
@given(text=ANY_TEXT.filter(lambda text: "<" not in text) | REPEATING)
@example("aaaaaaaaa ababababa          aaaaa")
@example("<0x41>")
def test_scores_merge_as_sentencepiece_does(spm, text):
    ours, processor = spm
    ids = ours.encode(text)
    assert ids == processor.encode(text)
    assert ours.decode(ids) == stream(ours, ids) == processor.decode(ids)


def test_scores_decide_and_not_the_order_of_tokens(tmp_path):
    """Training writes tokens by their scores, but a file may hold them in any order."""
    arrays = {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>", "ab", "bc", "a", "b", "c"],
        "scores": [0.0, 0.0, 0.0, -2.0, -1.0, -3.0, -4.0, -5.0],
        "token_type": [UNKNOWN, CONTROL, CONTROL, *[NORMAL] * 5],
        "add_space_prefix": False,
    }
    ours = load_tokenizer(write_metadata(tmp_path / "m.gguf", arrays=arrays))
    assert [ours.spelling(token) for token in ours.encode("abc")] == ["a", "bc"]


def test_sentencepiece_vocabulary(spm, tmp_path):
    ours, processor = spm
    for text in CORPUS[:5]:
        assert ours.encode(text, bos=True) == [processor.bos_id(), *processor.encode(text)]
    assert ours.decode(ours.encode("<s>fox</s>")) == "fox"
    assert ours.strips_first_space == (processor.encode("a", out_type=str)[0][0] == "\u2581")
    ours.save(tmp_path)
    check_same(load_tokenizer(tmp_path), ours)
    check_against(ours, AutoTokenizer.from_pretrained(tmp_path), "The quick 中 \U0001f6ff")


# Metadata


def every_type(path):
    writer = GGUFWriter(path, "llama")
    writer.add_int8("int8", -8)
    writer.add_uint8("uint8", 8)
    writer.add_int16("int16", -16)
    writer.add_uint16("uint16", 16)
    writer.add_int32("int32", -32)
    writer.add_uint32("uint32", 32)
    writer.add_int64("int64", -64)
    writer.add_uint64("uint64", 2**64 - 1)
    writer.add_float32("float32", 0.5)
    writer.add_float64("float64", 0.1)
    writer.add_bool("bool", True)
    writer.add_string("text", "grün 中")
    writer.add_array("texts", ["a", "", "ü"])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("floats", [0.5, 1.5])
    writer.add_array("flags", [True, False])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_metadata_is_what_the_gguf_package_reads(tmp_path):
    path = every_type(tmp_path / "m.gguf")
    expected = {name: field.contents() for name, field in GGUFReader(path).fields.items() if "GGUF." not in name}
    assert read_gguf(path).metadata == expected
    assert len(expected) == 17


def test_damaged_metadata_is_named(tmp_path):
    data = every_type(tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"cut.gguf' (is damaged|is not a GGUF file)"):
            read_gguf(path)
    nested = struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<I", 9)
    for content, message in [
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), r"GGUF version 1 is not supported, only \(2, 3\)"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), r"or it is big-endian"),
        (b"GGUF" + nested + struct.pack("<IQ", 13, 1) + bytes(9), "value type 13 at byte 49 is unknown"),
        (b"GGUF" + nested + struct.pack("<IQ", 6, 2**62), "is damaged"),
        (b"GGUF" + nested + struct.pack("<IQ", 9, 1) * 5000, "is damaged"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(path)
    with pytest.raises(ValueError, match=r"none.gguf' does not exist"):
        read_gguf(tmp_path / "none.gguf")
