"""Tokenizers trained here in the format of the package tokenizers: the same ids for any text, and what has no form."""

import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from attnzoo.checkpoint import export_model, load_tokenizer
from attnzoo.tokenizer import SentencePieceTokenizer
from attnzoo.tokenizer.convert import to_huggingface
from attnzoo.tokenizer.sentencepiece import SPACE
from tests.helpers import serving
from tests.helpers.foreign_tokenizers import ANY_TEXT, TEXTS, check_same
from tests.helpers.open_weights import demo_model
from train.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def converted():
    return serving.tokenizer(), to_huggingface(serving.tokenizer())


@settings(max_examples=500, deadline=None)
@given(text=st.one_of(ANY_TEXT, st.text("\u2581 ae<s>\n\U0001f680de", max_size=40)))
@example("literal \u2581 and \u2581\u2581, \u2581x")
@example("<s></s><unk><pad><0x41><0x0A>")
@example("  two  spaces  \n\n\n end ")
@example("\ufeffbom \0 e\u0301 \ufb01 \ue000 \U0010ffff")
def test_a_converted_tokenizer_gives_the_same_ids(converted, text):
    ours, theirs = converted
    assert theirs.encode(text, bos=True, eos=True) == ours.encode(text, bos=True, eos=True)
    assert theirs.decode(theirs.encode(text)) == text


def test_merges_of_few_letters(tmp_path):
    """Many ways into the same piece: where the order of merges would show."""
    draw = random.Random(3)
    for alphabet in ("ab ", "aab c"):
        lines = ["".join(draw.choices(alphabet, k=60)) for _ in range(300)]
        path = train_tokenizer(lines, 330, tmp_path / f"{len(alphabet)}.model")
        ours = SentencePieceTokenizer.load(path)
        theirs = to_huggingface(ours)
        for _ in range(1000):
            text = "".join(draw.choices(alphabet, k=draw.randint(1, 50)))
            assert theirs.encode(text) == ours.encode(text), text


def test_tokenizers_of_an_export(converted, tmp_path):
    ours, direct = converted
    export_model(tmp_path / "out", demo_model(), tokenizer=ours)
    loaded, theirs = load_tokenizer(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    check_same(loaded, direct)
    assert [loaded.spelling(token).replace(" ", SPACE) for token in range(400)] == list(map(ours.spelling, range(400)))
    assert list(map(loaded.token_bytes, range(400))) == list(map(ours.token_bytes, range(400)))
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id, loaded.stop_ids) == (1, 2, 0, ours.stop_ids)
    assert loaded.fingerprint() == direct.fingerprint()
    for text in [*TEXTS, "\u2581", "<s>", "</s><pad>"]:
        ids = ours.encode(text, bos=True)
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids, skip_special_tokens=True) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)
    assert SentencePieceTokenizer.load(tmp_path / "out" / "tokenizer.model").encode("a b") == ours.encode("a b")


def test_tokenizers_without_a_form_are_refused(tmp_path):
    from sentencepiece import SentencePieceTrainer

    options = {
        "vocab_size": 320, "byte_fallback": True, "normalization_rule_name": "identity", "add_dummy_prefix": False,
        "remove_extra_whitespaces": False, "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "minloglevel": 2,
    }  # fmt: skip
    for changes, message in (
        ({"model_type": "unigram"}, "the tokenizer is not BPE"),
        (
            {"model_type": "bpe", "user_defined_symbols": ["\n", "<|x|>"]},
            r"user-defined piece '<\|x\|>' of more than one",
        ),
    ):
        path = str(tmp_path / "model")
        lines = iter(serving.TEXT.splitlines() * 20)
        SentencePieceTrainer.train(sentence_iterator=lines, model_prefix=path, **options, **changes)
        with pytest.raises(ValueError, match=message):
            to_huggingface(SentencePieceTokenizer.load(tmp_path / "model.model"))
