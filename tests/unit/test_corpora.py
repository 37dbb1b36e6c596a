"""Corpora: what is read of files, directories and hubs, and what is refused by name."""

import gzip
import json
import os
import random
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.helpers.corpora import config, text, write_corpus
from train.data import DataConfig
from train.data.account import Account, account_line
from train.data.corpora import documents, fingerprint, split_documents

FLIPPED = bytearray(gzip.compress(b'{"text": "one"}\n' * 50, mtime=0))
"""A file of gzip with one damaged byte."""
FLIPPED[20] ^= 0xFF


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


def test_fingerprint_follows_the_files(tmp_path):
    corpus = write_corpus(tmp_path)
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
