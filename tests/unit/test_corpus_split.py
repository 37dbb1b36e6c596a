"""Training and validation text: disjoint, stable, and near the fraction even of a single document."""

import json

import pytest

from tests.helpers.corpora import config, text, write_corpus
from train.data.corpora import split_by_position, split_documents


def test_split_is_disjoint_stable_and_without_duplicates(tmp_path):
    corpus = write_corpus(tmp_path)
    split = list(split_documents(config(corpus)))
    assert len(split) == 59
    train, validation = ({d for side, d in split if side is wanted} for wanted in (True, False))
    assert len(train) + len(validation) == 59
    assert 4 <= len(validation) <= 22
    assert split == list(split_documents(config(corpus)))
    assert split != list(split_documents(config(corpus, seed=1)))
    more = corpus.read_text() + json.dumps({"text": text(99)}) + "\n"
    corpus.write_text(more)
    assert list(split_documents(config(corpus)))[:59] == split


def test_few_documents_are_split_by_position(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("".join(f"line {n}\n" for n in range(1000)), encoding="utf-8")
    (is_train, head), (is_also_train, tail) = split_documents(config(path, validation_fraction=0.1))
    assert (is_train, is_also_train) == (True, False)
    assert head + tail == path.read_text()
    assert tail.startswith("line ")
    assert 0.09 < len(tail) / len(head + tail) < 0.11


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
@pytest.mark.parametrize(
    "document",
    [
        "A title\n" + "word " * 2000,
        "A title\n\n" + "x" * 5000,
        "x" * 5000 + "\nand an end",
        "word " * 2000,
        "x" * 999,
        "".join(f"line {n}\n" for n in range(500)),
        "first\n" * 3 + "word " * 900 + "\n" + "last\n" * 3,
    ],
    ids=["title and words", "title and letters", "letters", "words", "one word", "lines", "all"],
)
def test_few_documents_are_split_near_the_fraction(document, fraction):
    (is_train, head), (is_also_train, tail) = split_by_position(document, config("x", validation_fraction=fraction))
    assert (is_train, is_also_train) == (True, False)
    assert head + tail == document
    assert fraction * 0.99 <= len(tail) / len(document) <= 1.5 * fraction + 0.01
    if " " in document[len(document) // 2 :] or "\n" in document[len(document) // 2 :]:
        assert head[-1] in "\n " or document.startswith("x")


@pytest.mark.parametrize("document", ["a", "ab", "\n", "a\n", " ", "\na"])
def test_short_documents_are_split_into_nothing_empty(document):
    parts = list(split_by_position(document, config("x", validation_fraction=0.05)))
    assert "".join(part for _, part in parts) == document
    assert all(part for _, part in parts)
