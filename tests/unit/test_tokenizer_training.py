"""Training a tokenizer: the text it reads, the file it keeps, the command."""

import subprocess
import sys
import tracemalloc

import pytest

from attnzoo.tokenizer import SentencePieceTokenizer
from tests.helpers.corpora import config, write_corpus
from train.tokenizer import (
    LONGEST_LINE,
    TokenizerConfig,
    ensure_tokenizer,
    main,
    sample_lines,
    train_tokenizer,
    training_documents,
)


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path)


def test_ensure_tokenizer_trains_once(corpus, tmp_path, monkeypatch):
    settings = TokenizerConfig(vocab_size=300)
    path = ensure_tokenizer(settings, config(corpus), tmp_path)
    before = path.stat().st_mtime_ns
    assert ensure_tokenizer(settings, config(corpus), tmp_path) == path
    assert path.stat().st_mtime_ns == before
    assert ensure_tokenizer(TokenizerConfig(vocab_size=301), config(corpus), tmp_path) != path
    assert ensure_tokenizer(TokenizerConfig(path=str(path)), config(corpus), tmp_path) == path


def test_sampled_lines_come_from_all_of_the_text():
    taken = 0

    def passing():
        nonlocal taken
        for n in range(5000):
            taken += 1
            yield f"line {n:05}\n\nsecond {n:05}\n"

    lines = sample_lines(passing(), 10_000)
    assert taken == 5000, "the corpus passes by once"
    assert 5_000 <= sum(map(len, lines)) <= 10_000
    places = [int(line.split()[1]) for line in lines]
    assert places == sorted(places)
    assert places[0] < 50
    assert places[-1] > 4900
    assert sample_lines(["a\nb\n\nc"], 10) == ["a", "b", "c"]
    assert sample_lines([], 10) == sample_lines([""], 10) == []
    one = sample_lines(["x" * 100 * LONGEST_LINE], 10 * LONGEST_LINE)
    assert 5 <= len(one) <= 10
    assert {len(line) for line in one} == {LONGEST_LINE}


def test_no_more_than_the_sample_is_held():
    """Of 60 MB that pass by, 100 kB stay."""
    tracemalloc.start()
    try:
        sample_lines((f"{n} " * 3000 for n in range(3000)), 100_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


def test_of_a_hub_the_beginning_is_read_for_the_tokenizer(monkeypatch):
    read = []

    class Records:
        def __iter__(self):
            for n in range(10_000):
                read.append(n)
                yield {"text": f"{n} " * 10_000}

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Records())
    monkeypatch.setattr("train.tokenizer.STREAM_BYTES", 1_000_000)
    for most in (None, 10**9):
        read.clear()
        assert sum(1 for _ in training_documents(config("hub:a/b", max_bytes=most))) > 10
        assert len(read) < 100
    read.clear()
    list(training_documents(config("hub:a/b", max_bytes=50_000)))
    assert len(read) < 10


def test_training_refuses_nothing_and_too_little(tmp_path):
    with pytest.raises(ValueError, match="no text to train"):
        train_tokenizer([" ", ""], 300, tmp_path / "t.model")
    with pytest.raises(ValueError, match=r"tokenizer.vocab_size=5000 does not suit 9 bytes"):
        train_tokenizer(["only this"], 5000, tmp_path / "t.model")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"tokenizer.vocab_size=100 must be between"):
        TokenizerConfig(vocab_size=100)


def test_the_command_trains_a_tokenizer(corpus, tmp_path, capsys):
    arguments = ["--source", str(corpus), "--vocab-size", "300", "--out", str(tmp_path / "t.model")]
    assert main(arguments) == 0
    assert "300 pieces" in capsys.readouterr().out
    assert SentencePieceTokenizer.load(tmp_path / "t.model").vocab_size == 300
    assert main([*arguments, "--source", str(tmp_path / "none.txt")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main([*arguments, "--vocab-size", "1"]) == 2
    assert "vocab_size=1 must be" in capsys.readouterr().err


@pytest.mark.heavy
def test_the_command_runs_as_a_module(corpus, tmp_path):
    arguments = ["--source", str(corpus), "--vocab-size", "300", "--out", str(tmp_path / "t.model")]
    words = [sys.executable, "-m", "train.tokenizer", *arguments]
    assert "300 pieces" in subprocess.run(words, capture_output=True, text=True, check=True).stdout
