"""Corpora, splits, tokens on disk and the order of batches."""

import json
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from attnzoo.tokenizer import SentencePieceTokenizer
from train.data import BatchStream, DataConfig, prepare
from train.data import tokens as tokens_module
from train.data.corpora import documents, fingerprint, split_documents
from train.tokenizer import TokenizerConfig, ensure_tokenizer, train_tokenizer

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "the",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "boil",
    "tea",
]


def text(number: int) -> str:
    random = np.random.default_rng(number)
    return " ".join(random.choice(WORDS, size=40)) + f"\nend of document {number}\n"


@pytest.fixture
def corpus(tmp_path):
    """A jsonl of 60 documents, two of them equal."""
    path = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"id": n, "text": text(n if n != 7 else 8)}) for n in range(60)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    return train_tokenizer([text(n) for n in range(30)], 300, tmp_path_factory.mktemp("t") / "tokenizer.model")


def config(path, **changes) -> DataConfig:
    return DataConfig(**({"source": str(path), "sequence_length": 16, "validation_fraction": 0.2} | changes))


def test_stdlib_is_there():
    head = list(documents(DataConfig(max_bytes=200_000)))
    assert 200_000 <= sum(len(d.encode()) for d in head) < 600_000


def test_every_kind_of_file_reads_the_same_documents(tmp_path):
    wanted = [text(n) for n in range(3)]
    folder = tmp_path / "folder"
    folder.mkdir()
    for n, document in enumerate(wanted):
        (folder / f"{n}.txt").write_text(document, encoding="utf-8")
    jsonl, parquet = tmp_path / "c.jsonl", tmp_path / "c.parquet"
    jsonl.write_text("\n\n".join(json.dumps({"body": d}) for d in wanted), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"body": wanted}), parquet)
    assert list(documents(config(folder))) == wanted
    assert list(documents(config(jsonl, text_field="body"))) == wanted
    assert list(documents(config(parquet, text_field="body"))) == wanted


def test_line_ends_survive(tmp_path):
    (tmp_path / "dos.txt").write_bytes(b"one\r\ntwo\rthree\n")
    assert list(documents(config(tmp_path / "dos.txt"))) == ["one\r\ntwo\rthree\n"]


def test_split_is_disjoint_stable_and_without_duplicates(corpus):
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


def stream(seed: int = 0) -> BatchStream:
    return BatchStream(np.arange(1003, dtype=np.uint16), 10, seed)


def global_batches(world: int, count: int, source: BatchStream | None = None) -> list[list[list[int]]]:
    """`count` global batches of 12 blocks, gathered from `world` processes."""
    ranks = [stream() for _ in range(world)]
    batches = []
    for _ in range(count):
        parts = [ranks[rank].next(12 // world, rank, world)[0] for rank in range(world)]
        batches.append(torch.cat(parts).tolist())
    return batches


def test_order_does_not_depend_on_the_number_of_processes():
    one = global_batches(1, 20)
    assert one == global_batches(2, 20) == global_batches(4, 20)


def test_an_epoch_visits_every_block_once_and_the_next_in_another_order():
    batches = stream()
    first = torch.cat([batches.next(10, 0, 1)[0] for _ in range(10)])
    assert sorted(first[:, 0].tolist()) == list(range(first[:, 0].min(), 1000 + first[:, 0].min(), 10))
    second = torch.cat([batches.next(10, 0, 1)[0] for _ in range(10)])
    assert first.tolist() != second.tolist()
    assert len(set(second[:, 0].tolist())) == 100


def test_targets_follow_their_tokens():
    tokens, targets = stream().next(5, 0, 1)
    assert tokens.dtype == torch.int64
    assert torch.equal(targets, tokens + 1)


def test_resuming_continues_exactly():
    original, resumed = stream(), stream()
    for _ in range(17):
        original.next(12, 0, 1)
    resumed.load(json.loads(json.dumps(original.state())))
    for _ in range(20):
        assert torch.equal(original.next(12, 0, 1)[0], resumed.next(12, 0, 1)[0])


@pytest.mark.parametrize(("batch", "rank", "world"), [(4, 2, 2), (4, -1, 2), (0, 0, 1)])
def test_impossible_batches_are_refused(batch, rank, world):
    with pytest.raises(ValueError, match=f"batch_size={batch}, rank={rank}, world={world}"):
        stream().next(batch, rank, world)


def test_seed_changes_the_order():
    assert not torch.equal(stream(0).next(12, 0, 1)[0], stream(1).next(12, 0, 1)[0])


def test_ensure_tokenizer_trains_once(corpus, tmp_path, monkeypatch):
    settings = TokenizerConfig(vocab_size=300)
    path = ensure_tokenizer(settings, config(corpus), tmp_path)
    before = path.stat().st_mtime_ns
    assert ensure_tokenizer(settings, config(corpus), tmp_path) == path
    assert path.stat().st_mtime_ns == before
    assert ensure_tokenizer(TokenizerConfig(vocab_size=301), config(corpus), tmp_path) != path
    assert ensure_tokenizer(TokenizerConfig(path=str(path)), config(corpus), tmp_path) == path


def test_fingerprint_follows_the_files(corpus):
    before = fingerprint(config(corpus))
    corpus.write_text(corpus.read_text() + "{}\n")
    assert fingerprint(config(corpus)) != before


@pytest.mark.parametrize(
    ("name", "content", "changes", "message"),
    [
        ("none.txt", None, {}, r"data.source='.*none.txt' does not exist; give 'stdlib'"),
        ("a.txt", b"", {}, "holds no text"),
        ("a.txt", b"\xff\xfe", {}, r"a.txt is not UTF-8 text \(byte 0\)"),
        ("a.docx", b"x", {}, r"unknown kind of file '.docx'; known: .txt"),
        ("a.jsonl", b"{bad", {}, r"a.jsonl:1 is not JSON"),
        ("a.jsonl", b'{"body": "x"}', {}, r"data.text_field='text' is no text in .*a.jsonl:1; found body"),
        ("a.jsonl", b"[1]", {}, "found list"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xff"}', {}, r"a.jsonl:2 is not UTF-8 text \(byte 10\); convert it"),
        ("a.jsonl", b'{"text": null}', {}, r"data.text_field='text' holds NoneType in .*a.jsonl:1, not text"),
        ("a.parquet", b"no parquet", {}, r"a.parquet is not a readable parquet file"),
    ],
)
def test_bad_sources_are_named(tmp_path, name, content, changes, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(split_documents(config(tmp_path / name, **changes)))


def test_parquet_without_the_column_is_named(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"data.text_field='text' is no text in .*; found body"):
        list(documents(config(tmp_path / "a.parquet")))


def test_hub_without_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"data.source='hub:a/b' needs the package `datasets`"):
        list(documents(config("hub:a/b")))


def test_hub_without_network_is_named(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"data.source='hub:attnzoo/none'.*cannot be read from the hub"):
        list(documents(config("hub:attnzoo/none")))


def test_too_short_corpora_are_named(tmp_path, tokenizer_path):
    (tmp_path / "a.txt").write_text("the quick brown fox\n" * 4)
    with pytest.raises(ValueError, match=r"the train split .* fewer than one block of data.sequence_length=999"):
        prepare(config(tmp_path / "a.txt", sequence_length=999), tokenizer_path, tmp_path, is_main=True, progress=False)
    with pytest.raises(ValueError, match="one global batch takes 500 blocks of 10 tokens"):
        stream().next(500, 0, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_fraction": 0.0}, "validation_fraction=0.0 must be between"),
        ({"sequence_length": 0}, "sequence_length=0"),
        ({"max_bytes": 0}, "max_bytes=0"),
        ({"source": ""}, "data.source is empty"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        config("stdlib", **changes)
