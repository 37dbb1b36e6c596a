"""Corpora, splits, tokens on disk and the order of batches."""

import gzip
import json
import os
import random
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from attnzoo.tokenizer import SentencePieceTokenizer
from train.data import BatchStream, DataConfig, prepare
from train.data import tokens as tokens_module
from train.data.account import Account, account_line
from train.data.corpora import documents, fingerprint, split_by_position, split_documents
from train.tokenizer import (
    LONGEST_LINE,
    TokenizerConfig,
    ensure_tokenizer,
    main,
    sample_lines,
    train_tokenizer,
    training_documents,
)

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


FLIPPED = bytearray(gzip.compress(b'{"text": "one"}\n' * 50, mtime=0))
"""A file of gzip with one damaged byte."""
FLIPPED[20] ^= 0xFF


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


@pytest.mark.parametrize("size", [1003, 1000, 1001, 1009, 100, 11, 10])
def test_an_epoch_visits_every_token_once_and_the_next_in_other_blocks(size):
    """Tokens are their places; all but a rest shorter than a block are inputs once an epoch, and so targets."""
    batches, seen = BatchStream(np.arange(size, dtype=np.uint16), 10, 0), []
    for _ in range(4):
        pairs = [batches.next(1, 0, 1) for _ in range(size // 10)]
        tokens, targets = (torch.cat(part) for part in zip(*pairs, strict=True))
        assert tokens.dtype == torch.int64
        assert torch.equal(targets, (tokens + 1) % size)
        places = tokens.flatten().tolist()
        assert len(set(places)) == len(places) == size - size % 10
        seen.append(tuple(sorted(row[0] % 10 for row in tokens.tolist())))
    assert len(set(seen)) > 1, "every epoch has the same blocks"


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


def test_the_command_trains_a_tokenizer(corpus, tmp_path, capsys):
    arguments = ["--source", str(corpus), "--vocab-size", "300", "--out", str(tmp_path / "t.model")]
    assert main(arguments) == 0
    assert "300 pieces" in capsys.readouterr().out
    assert main([*arguments[:1], str(tmp_path / "none.txt"), *arguments[2:]]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_fingerprint_follows_the_files(corpus):
    before = fingerprint(config(corpus))
    corpus.write_text(corpus.read_text() + "{}\n")
    assert fingerprint(config(corpus)) != before


def account_of(source, **changes) -> tuple[list[str], dict]:
    """Documents of both sides in order, and what became of the rest."""
    account = Account()
    found = [document for _, document in split_documents(config(source, **changes), account)]
    return found, account.to_dict()


def test_what_is_read_of_a_directory_and_what_is_not(tmp_path):
    """Suffixes in any case, gzip, marks and links; hidden files and other kinds are counted, not lost in silence."""
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    (folder / "deep").mkdir(parents=True)
    outside.mkdir()
    files = {
        "a.TXT": b"one\n",
        "b.txt.gz": gzip.compress(b"two\r\n", mtime=0),
        "c.Md": "\ufeffthree\n".encode(),
        "d.JSONL": b'\xef\xbb\xbf{"text": "four"}\r\n\r\n\xef\xbb\xbf{"text": "\\ufefffive"}\r\n',
        "e.jsonl.GZ": gzip.compress(b'{"text": "six"}\n{"text": "six"}\n{"text": ""}', mtime=0),
        "deep/f.ndjson": b'{"text": "seven"}',
        "deep/empty.txt": b"",
        "deep/mark.txt": b"\xef\xbb\xbf",
        "deep/copy.txt": b"one\n",
        ".hidden.txt": b"no",
        "g.json": b'{"text": "no"}',
        "h.docx": b"no",
        "i.parquet.gz": b"no",
        "noend": b"no",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / ".git").mkdir()
    (folder / ".git" / "x.txt").write_text("no")
    (outside / "j.txt").write_text("eight")
    (folder / "k.txt").symlink_to(outside / "j.txt")
    (outside / "sub").mkdir()
    (outside / "sub" / "l.txt").write_text("nine")
    (folder / "linked").symlink_to(outside / "sub", target_is_directory=True)
    (folder / "m.txt").symlink_to(tmp_path / "nowhere")
    (folder / "deep" / "round").symlink_to(folder, target_is_directory=True)
    found, account = account_of(folder, validation_fraction=0.01)
    # With few documents each is cut in two; joined, they are the texts byte for byte.
    assert "".join(found) == "one\ntwo\r\nthree\nfourfivesevensixeightnine"
    skipped = {"hidden": 2, "of another kind": 4, "links to nothing": 1, "links to what is read anyway": 1}
    assert account["files_skipped"] == skipped
    assert account["files"] == 11
    assert (account["documents"], account["duplicates"], account["empty"], account["complete"]) == (9, 2, 3, True)
    line = account_line("x", account)
    assert "11 files read, 8 skipped (2 hidden; 1 links to nothing; 1 links to what is read anyway; 4 of" in line
    assert "9 documents, 2 duplicates and 3 empty ones dropped" in line
    assert "\n" not in line


def test_one_file_of_any_kind_may_be_given(tmp_path):
    for name, content in {"a.Txt": b"one", "a.JSONL.gz": gzip.compress(b'{"text": "one"}', mtime=0)}.items():
        (tmp_path / name).write_bytes(content)
        assert list(documents(config(tmp_path / name))) == ["one"]


def test_max_bytes_is_said(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    found, account = account_of(tmp_path / "a.jsonl", max_bytes=4)
    assert "".join(found) == "onetwo"
    assert account["complete"] is False
    assert account_line("x", account).endswith("; ended by data.max_bytes")


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


@pytest.mark.parametrize(
    ("name", "content", "changes", "message"),
    [
        ("none.txt", None, {}, r"data.source='.*none.txt' does not exist; give 'stdlib'"),
        ("a.txt", b"", {}, "holds no text"),
        ("a.txt", b"\xff\xfe", {}, r"a.txt is not UTF-8 text \(byte 0\)"),
        ("a.docx", b"x", {}, r"unknown kind of file '.docx'; known: .txt"),
        ("a.json", b"{}", {}, r"unknown kind of file '.json'; .* one record a line, as .jsonl"),
        ("a", b"x", {}, r"unknown kind of file ''; known: .txt"),
        ("a.gz", b"x", {}, r"unknown kind of file '.gz'; known: .txt"),
        (".txt", b"x", {}, r"unknown kind of file ''; known: .txt"),
        ("a.txt", "abc".encode("utf-16"), {}, r"not UTF-8 text \(byte 0\); it looks like UTF-16; convert it"),
        ("a.jsonl", '{"text": "abc"}'.encode("utf-16"), {}, r"a.jsonl:1 is not UTF-8 .* looks like UTF-16"),
        ("a.txt.gz", b"plain", {}, r"a.txt.gz cannot be read \(Not a gzipped file .*write it again"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], {}, r"a.txt.gz cannot be read \(Compressed file ended"),
        ("a.jsonl.gz", FLIPPED, {}, r"a.jsonl.gz:1 is not JSON"),
        ("a.jsonl", b"[" * 100_000, {}, r"a.jsonl:1 is not JSON \("),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", {}, r"a.jsonl:1 is not JSON \("),
        ("a.jsonl", b'{"text": "x"} {"text": "y"}', {}, r"a.jsonl:1 is not JSON \(Extra data\)"),
        ("a.jsonl", b'{"text": ["x"]}', {}, r"holds list in .*a.jsonl:1, not text"),
        ("a.jsonl", b'{"text": "x", "text": "y"}', {}, r"a.jsonl:1 is not JSON \('text' is set twice"),
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


def test_columns_of_one_name_are_refused(tmp_path):
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    pyarrow.parquet.write_table(pyarrow.table(columns, names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet has several columns data.text_field='text'; keep one"):
        list(documents(config(tmp_path / "a.parquet")))


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd"])
def test_damaged_parquet_is_named(tmp_path, compression):
    """A flipped byte anywhere is one line that names the file, or changes nothing that is read."""
    path, wanted = tmp_path / "a.parquet", [f"{text(n)} \u00e4" for n in range(20)]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": wanted}), path, compression=compression, write_page_checksum=True, row_group_size=7
    )
    whole = path.read_bytes()
    assert list(documents(config(path))) == wanted
    generator, refused = random.Random(0), []
    for place in generator.sample(range(len(whole)), 150):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            assert list(documents(config(path))) == wanted
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 20
    assert all("a.parquet" in message and "\n" not in message for message in refused)


def as_nobody():
    """The superuser may read everything: permissions are tried as another user where tests run as that one."""
    if os.geteuid() == 0:
        os.seteuid(65534)


def test_files_without_permission_are_named(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    closed = {"a.txt": b"x", "a.jsonl": b'{"text": "x"}', "a.txt.gz": gzip.compress(b"x", mtime=0), "a.parquet": b"x"}
    for name, content in closed.items():
        (folder / name).write_bytes(content)
        (folder / name).chmod(0)
    inner = folder / "closed"
    inner.mkdir(mode=0)
    opened = [path for path in folder.parents if path != Path("/") and not path.stat().st_mode & 1]
    modes = [path.stat().st_mode for path in opened]
    user = os.geteuid()
    try:
        for path in opened:
            path.chmod(0o711)
        folder.chmod(0o755)
        as_nobody()
        for source in (*(folder / name for name in closed), inner, inner / "x.txt", folder):
            with pytest.raises(ValueError, match=r"cannot be read \(Permission denied\); check its permissions"):
                list(documents(config(source)))
    finally:
        os.seteuid(user)
        for path, mode in zip(opened, modes, strict=True):
            path.chmod(mode)


def test_parquet_without_the_column_is_named(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"data.text_field='text' is no text in .*; found body"):
        list(documents(config(tmp_path / "a.parquet")))


@pytest.mark.parametrize("name", ["", ":", ":en", " ", "/", "a/", "/a", "a/b/c", ".", "..", "./a", "a b", "a\0"])
def test_a_hub_source_names_a_dataset(name):
    with pytest.raises(ValueError, match=r"data\.source='hub:.* names no dataset; give 'hub:<dataset id>'"):
        config(f"hub:{name}")
    for known in ("hub:imdb", "hub:a-b/c_d.e", "hub:a/b:en", "hub:a/b:2024.en-x", "hub:a/b:"):
        assert config(known).source == known


def test_hub_without_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"data.source='hub:a/b' needs the package `datasets`"):
        list(documents(config("hub:a/b")))


@pytest.mark.heavy
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
