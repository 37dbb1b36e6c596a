"""Finds and reads files of text, JSON lines and parquet; text and JSON lines may be compressed with gzip.

Suffixes may be in upper case. Links are followed. Hidden files and directories (whose names begin with a dot) and files
of other kinds are skipped and counted.
"""

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from attnzoo.files import unique_keys, user_path
from train.data.account import Account
from train.data.config import DataConfig

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".tex")
LINES_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIX = ".parquet"
COMPRESSED = ".gz"
MARK = "\ufeff"
KNOWN = f"{', '.join((*TEXT_SUFFIXES, *LINES_SUFFIXES))} (each also with {COMPRESSED}), {PARQUET_SUFFIX}"

HIDDEN, OTHER, BROKEN, AGAIN = "hidden", "of another kind", "links to nothing", "links to what is read anyway"


def find_files(config: DataConfig, account: Account | None = None) -> list[Path]:
    """The files that `read_files` reads, in order. Raises ValueError that names the source."""
    account = Account() if account is None else account
    root = user_path(config.source, "data.source")
    try:
        if not root.exists():
            raise ValueError(
                f"data.source={config.source!r} does not exist; give 'stdlib', a path of text, jsonl or parquet, or "
                "'hub:<dataset id>'"
            )
        if root.is_dir():
            found = sorted(_walk(root, root, set(), account))
        else:
            _kind(root)
            if not root.is_file():
                raise ValueError(f"data.source={config.source!r} is neither a file nor a directory")
            found = [root]
    except OSError as error:
        raise _unreadable(Path(error.filename or root), error) from None
    if not found:
        raise ValueError(
            f"data.source={config.source!r} holds no file of a known kind ({sum(account.skipped.values())} others); "
            f"known: {KNOWN}"
        )
    return found


def read_files(config: DataConfig, account: Account) -> Iterator[str]:
    """Yields every document: a text file is one document; a line of JSON or a row of parquet has one in `text_field`.

    Raises ValueError that names the file and, if possible, the line.
    """
    for path in find_files(config, account):
        account.files += 1
        try:
            yield from _kind(path)(path, config)
        except (OSError, EOFError, zlib.error) as error:
            raise _unreadable(path, error) from None


def _walk(root: Path, directory: Path, seen: set[Path], account: Account) -> Iterator[Path]:
    """Yields files below `directory`. seen: directories read already, to which links may lead again."""
    here = directory.resolve()
    if here in seen:
        account.skip(str(directory.relative_to(root)), AGAIN)
        return
    seen.add(here)
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        path = directory / entry.name
        if entry.name.startswith("."):
            account.skip(str(path.relative_to(root)), HIDDEN)
        elif entry.is_dir():
            yield from _walk(root, path, seen, account)
        elif not path.exists():
            account.skip(str(path.relative_to(root)), BROKEN)
        elif not entry.is_file() or _reader_of(path) is None:
            account.skip(str(path.relative_to(root)), OTHER)
        else:
            yield path


Reader = Callable[[Path, DataConfig], Iterator[str]]


def _kind(path: Path) -> Reader:
    reader = _reader_of(path)
    if reader is None:
        suffixes = [suffix.lower() for suffix in path.suffixes]
        hint = "; a .json file has to hold one record a line, as .jsonl" if ".json" in suffixes else ""
        raise ValueError(f"data.source={str(path)!r}: unknown kind of file {path.suffix!r}; known: {KNOWN}{hint}")
    return reader


def _reader_of(path: Path) -> Reader | None:
    """The reader for a file of this name; None for other kinds of files."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]] or [""]
    compressed = suffixes[-1] == COMPRESSED
    suffix = suffixes[-2] if compressed and len(suffixes) > 1 else suffixes[-1]
    if suffix in TEXT_SUFFIXES:
        return _read_text
    if suffix in LINES_SUFFIXES:
        return _read_lines
    return _read_parquet if suffix == PARQUET_SUFFIX and not compressed else None


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() != COMPRESSED:
        return path.open("rb")
    return gzip.open(path, "rb")  # type: ignore[return-value]


def _read_text(path: Path, config: DataConfig) -> Iterator[str]:
    with _open(path) as file:
        content = file.read()
    try:
        yield content.decode("utf-8")  # not read_text, which would turn \r\n into \n
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}){_coded(content)}; convert it") from None


def _read_lines(path: Path, config: DataConfig) -> Iterator[str]:
    with _open(path) as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            try:
                # A concatenation of files may have a byte order mark in the middle.
                text = line.decode("utf-8").removeprefix(MARK)
                if not text.strip():
                    continue
                record = json.loads(text, object_pairs_hook=unique_keys)
            except UnicodeDecodeError as error:
                raise ValueError(f"{where} is not UTF-8 text (byte {error.start}){_coded(line)}; convert it") from None
            except (ValueError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                raise ValueError(f"{where} is not JSON ({reason}); a file holds one record a line") from None
            yield text_of(record, config, where)


def _coded(content: bytes) -> str:
    """A hint for the error message if the first bytes look like UTF-16."""
    return "; it looks like UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ""


def _read_parquet(path: Path, config: DataConfig) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
        if file.schema_arrow.names.count(config.text_field) > 1:
            raise ValueError(f"{path} has several columns data.text_field={config.text_field!r}; keep one of them")
        if config.text_field not in file.schema_arrow.names:
            text_of(dict.fromkeys(file.schema_arrow.names), config, str(path))
        row = 0
        for batch in file.iter_batches(columns=[config.text_field]):
            for value in batch.column(0).to_pylist():
                row += 1
                yield text_of({config.text_field: value}, config, f"{path}, row {row}")
        if row != file.metadata.num_rows:
            raise ValueError(f"{path} is damaged: it has {row:,} of {file.metadata.num_rows:,} rows; write it again")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, PermissionError | FileNotFoundError):
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a readable parquet file ({reason}); write it again") from None


def text_of(record: Any, config: DataConfig, where: str) -> str:
    """The text of a record. where: its file and line. Raises ValueError that names it and the record's fields."""
    value = record.get(config.text_field) if isinstance(record, dict) else None
    if isinstance(record, dict) and config.text_field in record and not isinstance(value, str):
        raise ValueError(
            f"data.text_field={config.text_field!r} holds {type(value).__name__} in {where}, not text; remove such "
            "records or name another field"
        )
    if not isinstance(value, str):
        keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(
            f"data.text_field={config.text_field!r} is no text in {where}; found {keys}: "
            "set data.text_field to one of them"
        )
    return value


def _unreadable(path: Path, error: Exception) -> ValueError:
    told = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else None
    reason, way = (told, "check its permissions and its disk") if told else (str(error), "write it again")
    return ValueError(f"{path} cannot be read ({reason}); {way}, or take it out of data.source")
