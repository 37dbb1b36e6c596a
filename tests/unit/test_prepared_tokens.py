"""Tokens on disk: prepared once, by the main process; damage, changes and interruptions are seen."""

import json
import os

import pytest
import torch

from attnzoo.tokenizer import SentencePieceTokenizer
from tests.helpers import serving
from tests.helpers.corpora import config, write_corpus
from train.data import prepare
from train.data import tokens as tokens_module
from train.data.corpora import split_documents


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path)


@pytest.fixture
def tokenizer_path():
    return serving.tokenizer_path()


def test_prepared_tokens(corpus, tokenizer_path, tmp_path):
    data = prepare(config(corpus), tokenizer_path, tmp_path, is_main=True, progress=False)
    tokenizer = SentencePieceTokenizer.load(tokenizer_path)
    validation = [d for side, d in split_documents(config(corpus)) if not side]
    expected = [token for d in validation for token in tokenizer.encode(d, bos=True, eos=True)]
    assert data.validation_tokens.tolist() == expected
    assert data.num_validation_bytes == sum(len(d.encode()) for d in validation)
    tokens, targets = data.validation_blocks()
    assert tokens.flatten().tolist() == expected[: tokens.numel()]
    assert targets.flatten().tolist() == expected[1 : tokens.numel() + 1]
    assert len(expected) - 1 - tokens.numel() < 16
    covered = b"".join(tokenizer.token_bytes(token) for token in targets.flatten().tolist())
    assert data.bytes_per_token(targets) == pytest.approx(len(covered) / targets.numel(), rel=1e-6)
    partly = targets.clone()
    partly[:, ::2] = -100
    assert data.bytes_per_token(partly) == data.bytes_per_token(targets[:, 1::2])
    some_tokens, some_targets = data.validation_blocks(3)
    assert torch.equal(some_targets[:, :-1], some_tokens[:, 1:])
    spread = [len(tokens) * part // 3 for part in range(3)]
    assert torch.equal(some_tokens, tokens[spread])


def test_cache_is_built_once_and_by_the_main_process(corpus, tokenizer_path, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="prepare them in the main process first"):
        prepare(config(corpus), tokenizer_path, tmp_path, is_main=False)
    prepare(config(corpus), tokenizer_path, tmp_path, is_main=True, progress=False)

    def no_build(*_: object) -> None:
        raise AssertionError("the cache was built again")

    monkeypatch.setattr(tokens_module, "_build", no_build)
    other = prepare(config(corpus, sequence_length=8, isolate_documents=True), tokenizer_path, tmp_path, is_main=False)
    assert other.validation_blocks()[0].shape[1] == 8
    with pytest.raises(AssertionError):
        prepare(config(corpus, seed=5), tokenizer_path, tmp_path, is_main=True)
    corpus.write_text(corpus.read_text() + json.dumps({"text": "new"}) + "\n")
    with pytest.raises(AssertionError):
        prepare(config(corpus), tokenizer_path, tmp_path, is_main=True)


def damage_cut(directory):
    path = directory / "train.bin"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3 // 2 * 2])


def damage_flip(directory):
    content = bytearray((directory / "validation.bin").read_bytes())
    content[5] ^= 1
    (directory / "validation.bin").write_bytes(content)


def damage_swap(directory):
    (directory / "train.bin").write_bytes((directory / "validation.bin").read_bytes())


def damage_about(content):
    def damage(directory):
        (directory / "about.json").write_bytes(content)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        damage_cut,
        damage_flip,
        damage_swap,
        *map(damage_about, [b"", b"{", b"[]", b"{}", b"null", b"\xff", b'{"dtype": "none"}', b'{"dtype": "uint16"}']),
        lambda directory: (directory / "about.json").unlink(),
        lambda directory: (directory / "train.bin").unlink(),
        lambda directory: (directory / "train.bin").write_bytes(b""),
        lambda directory: [path.unlink() for path in directory.iterdir()],
    ],
)
def test_damaged_tokens_are_named_with_the_way_out(corpus, tokenizer_path, tmp_path, damage):
    prepare(config(corpus), tokenizer_path, tmp_path, is_main=True, progress=False)
    (directory,) = (tmp_path / "tokens").iterdir()
    damage(directory)
    with pytest.raises(ValueError, match=r"damaged.*; delete .*/tokens/\w+ and start again: it is prepared anew"):
        prepare(config(corpus), tokenizer_path, tmp_path, is_main=True, progress=False)
    if damage is damage_cut:
        with pytest.raises(ValueError, match="damaged"):
            prepare(config(corpus), tokenizer_path, tmp_path, is_main=False)


def test_other_text_of_equal_size_and_time_is_seen(corpus, tokenizer_path, tmp_path):
    before = corpus.stat()
    first = prepare(config(corpus), tokenizer_path, tmp_path, is_main=True, progress=False)
    corpus.write_text(corpus.read_text().replace("wizards", "lizards"))
    os.utime(corpus, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (corpus.stat().st_size, corpus.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    second = prepare(config(corpus), tokenizer_path, tmp_path, is_main=True, progress=False)
    assert first.digest != second.digest
    assert prepare(config(corpus), tokenizer_path, tmp_path, is_main=False).digest == second.digest


def test_preparation_says_what_became_of_files_and_documents(corpus, tokenizer_path, tmp_path, capsys):
    data = prepare(config(corpus), tokenizer_path, tmp_path, is_main=True)
    line = "1 file read, 0 skipped, 59 documents, 1 duplicate and 0 empty ones dropped"
    assert line in capsys.readouterr().err
    (about,) = (tmp_path / "tokens").glob("*/about.json")
    assert json.loads(about.read_text())["account"] == data.account
    prepare(config(corpus), tokenizer_path, tmp_path, is_main=True)
    assert line in capsys.readouterr().err, "prepared tokens say it too"


def test_a_cache_that_cannot_be_written_is_named(corpus, tokenizer_path, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written to .*file/tokens/\w+ \(.*set cache_dir to another"):
        prepare(config(corpus), tokenizer_path, tmp_path / "file", is_main=True, progress=False)


def test_interrupted_preparation_leaves_nothing_to_be_taken(corpus, tokenizer_path, tmp_path, monkeypatch):
    right = SentencePieceTokenizer.encode
    calls = iter(range(30))

    def fails_midway(self, *arguments, **options):
        if next(calls) == 20:
            raise KeyboardInterrupt
        return right(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(SentencePieceTokenizer, "encode", fails_midway)
        with pytest.raises(KeyboardInterrupt):
            prepare(config(corpus), tokenizer_path, tmp_path, is_main=True, progress=False)
    with pytest.raises(ValueError, match="prepare them in the main process first"):
        prepare(config(corpus), tokenizer_path, tmp_path, is_main=False)
    assert not list((tmp_path / "tokens").iterdir())
    whole = prepare(config(corpus), tokenizer_path, tmp_path, is_main=True, progress=False)
    assert whole.num_train_tokens > 0


def test_too_short_corpora_are_named(tmp_path, tokenizer_path):
    (tmp_path / "a.txt").write_text("the quick brown fox\n" * 4)
    with pytest.raises(ValueError, match=r"the train split .* fewer than one block of data.sequence_length=999"):
        prepare(config(tmp_path / "a.txt", sequence_length=999), tokenizer_path, tmp_path, is_main=True, progress=False)
