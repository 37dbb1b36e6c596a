"""The tokenizer: any text round-trips, streams decode alike, training is deterministic, bad models are refused."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from attnzoo.tokenizer import SentencePieceTokenizer
from train.tokenizer import train_tokenizer

TEXT = [
    "def read(path):",
    "    with open(path) as file:",
    "        return file.read()",
    "The quick brown fox jumps over the lazy dog.",
    "naïve café, Grüße",
] * 40


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return train_tokenizer(TEXT, 320, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def tokenizer(path):
    return SentencePieceTokenizer.load(path)


ANY_TEXT = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t\r\0\u2581<>0x sfoe/")))


@settings(max_examples=400, deadline=None)
@given(text=ANY_TEXT)
@example("")
@example("  two  spaces  ")
@example("\r\n\t\0 end ")
@example("literal \u2581 and \u2581\u2581, \u2581x")
@example("<s></s><unk><pad><0x41><0x0A>")
@example("e\u0301 \ufb01 \uff21 \u00a0 \ue000 \U0001f468\u200d\U0001f469 \U0010ffff")
@example("\ufeffbom")
def test_any_text_round_trips_and_streams(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_id not in ids
    decoder = tokenizer.decoder()
    assert "".join(map(decoder.push, ids)) + decoder.finish() == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@given(ids=st.lists(st.integers(0, 319)))
@settings(max_examples=200, deadline=None)
def test_any_ids_stream_as_they_decode(tokenizer, ids):
    decoder = tokenizer.decoder()
    assert "".join(map(decoder.push, ids)) + decoder.finish() == tokenizer.decode(ids)


def test_characters_appear_when_they_are_whole(tokenizer):
    decoder = tokenizer.decoder()
    ids = tokenizer.encode("\U0001f600")
    assert len(ids) == 4
    assert [decoder.push(token) for token in ids] == ["", "", "", "\U0001f600"]
    decoder.push(ids[0])
    assert decoder.finish() == "\ufffd"


def test_control_tokens_vanish(tokenizer):
    ids = tokenizer.encode("fox", bos=True, eos=True)
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode([0, *ids, 3]) == "fox"


def test_refused_text_and_ids(tokenizer):
    with pytest.raises(ValueError, match=r"lone surrogate \(U\+D800\) at character 1"):
        tokenizer.encode("a\ud800")
    for token in (-1, 320):
        with pytest.raises(ValueError, match=f"token {token} is outside the vocabulary of 320"):
            tokenizer.decode([token])


def test_training_is_deterministic(path, tmp_path):
    again = train_tokenizer(TEXT, 320, tmp_path / "again.model")
    assert again.read_bytes() == path.read_bytes()


def test_save(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "copy")
    assert SentencePieceTokenizer.load(tmp_path / "copy" / "tokenizer.model").encode("fox") == tokenizer.encode("fox")


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"'.*none.model' does not exist; train one"):
        SentencePieceTokenizer.load(tmp_path / "none.model")
    (tmp_path / "bad.model").write_bytes(b"\xff\xfe no model")
    with pytest.raises(ValueError, match="is not a sentencepiece model"):
        SentencePieceTokenizer.load(tmp_path / "bad.model")


GOOD = {
    "vocab_size": 320, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
    "add_dummy_prefix": False, "remove_extra_whitespaces": False, "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3,
    "minloglevel": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"byte_fallback": False, "vocab_size": 60}, "no byte fallback"),
        ({"normalization_rule_name": "nmt_nfkc"}, "has normalisation rules"),
        ({"add_dummy_prefix": True}, "changes"),
        ({"remove_extra_whitespaces": True}, "changes"),
        ({"pad_id": 3, "unk_id": 0}, "token 0 is not '<pad>'"),
    ],
)
def test_models_that_cannot_round_trip_are_refused(tmp_path, changes, message):
    from sentencepiece import SentencePieceTrainer

    prefix = str(tmp_path / "other")
    SentencePieceTrainer.train(sentence_iterator=iter(TEXT), model_prefix=prefix, **(GOOD | changes))
    with pytest.raises(ValueError, match=message):
        SentencePieceTokenizer.load(tmp_path / "other.model")


def test_a_rule_for_one_letter_is_refused(tmp_path):
    from sentencepiece import SentencePieceTrainer

    (tmp_path / "rule.tsv").write_text("51 75\t71\n")  # "Qu" becomes "q": no probe text would show it
    changes = {"normalization_rule_name": "", "normalization_rule_tsv": str(tmp_path / "rule.tsv")}
    SentencePieceTrainer.train(sentence_iterator=iter(TEXT), model_prefix=str(tmp_path / "rule"), **(GOOD | changes))
    with pytest.raises(ValueError, match="has normalisation rules"):
        SentencePieceTokenizer.load(tmp_path / "rule.model")
