"""Documents from any source, and their split into training and validation."""

import hashlib
import itertools
import json
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from train.data.config import DataConfig
from train.data.retrieval import SOURCE, retrieval_documents

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".tex")
FEW_DOCUMENTS = 20
"""With fewer documents the split is by position within each, as whole documents would be too coarse."""


def split_documents(config: DataConfig) -> Iterator[tuple[bool, str]]:
    """(is_train, document) for every distinct document, in the order of the source.

    A document's side follows from its content and the seed, so no text is on both sides and new documents move no old
    ones. Raises ValueError as `documents`, and when nothing is left for one of the sides.
    """
    found = _distinct(documents(config))
    first = list(itertools.islice(found, FEW_DOCUMENTS))
    if len(first) < FEW_DOCUMENTS:
        yield from itertools.chain.from_iterable(_split_by_position(document, config) for document in first)
        return
    for document in itertools.chain(first, found):
        digest = hashlib.sha256(f"{config.seed} {document}".encode()).digest()
        yield int.from_bytes(digest[:8], "big") >= config.validation_fraction * 2**64, document


def _split_by_position(document: str, config: DataConfig) -> Iterator[tuple[bool, str]]:
    """The end of the document, from the start of a line on, is for validation."""
    cut = int(len(document) * (1 - config.validation_fraction))
    cut = document.rfind("\n", 0, cut) + 1 or cut
    yield True, document[:cut]
    yield False, document[cut:]


def _distinct(found: Iterable[str]) -> Iterator[str]:
    seen = set()
    for document in found:
        digest = hashlib.sha256(document.encode()).digest()
        if document and digest not in seen:
            seen.add(digest)
            yield document


def documents(config: DataConfig) -> Iterator[str]:
    """Documents of the source, up to about max_bytes. Raises ValueError that names the source and the way out."""
    read = 0
    for document in _reader(config)(config):
        # Lone surrogates (from JSON escapes) are no text that UTF-8 could hold.
        document = document.encode("utf-8", errors="replace").decode("utf-8")
        yield document
        read += len(document.encode())
        if config.max_bytes is not None and read >= config.max_bytes:
            return
    if read == 0:
        raise ValueError(f"data.source={config.source!r} holds no text")


def fingerprint(config: DataConfig) -> str:
    """Changes when the text of the source may have changed: names, sizes and times of its files, or the hub id."""
    parts = [config.source, config.text_field, config.split, str(config.max_bytes)]
    parts += [str(config.validation_fraction), str(config.seed)]
    if config.source == SOURCE or config.source.startswith("hub:"):
        return " ".join(parts)
    files = _stdlib_files() if config.source == "stdlib" else _files(config)
    stamps = ((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    return " ".join([*parts, sys.version.split()[0], hashlib.sha256(repr(list(stamps)).encode()).hexdigest()])


def _reader(config: DataConfig) -> Callable[[DataConfig], Iterator[str]]:
    if config.source == "stdlib":
        return _read_stdlib
    if config.source == SOURCE:
        return retrieval_documents
    if config.source.startswith("hub:"):
        return _read_hub
    return _read_files


def _stdlib_files() -> list[Path]:
    """The standard library's sources without its tests: about 700 files, 12 MB, on every machine that has Python."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return sorted(p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts))


def _read_stdlib(config: DataConfig) -> Iterator[str]:
    for path in _stdlib_files():
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few modules declare another encoding
            continue


def _files(config: DataConfig) -> list[Path]:
    path = Path(config.source)
    if not path.exists():
        raise ValueError(
            f"data.source={config.source!r} does not exist; give 'stdlib', a path of text, jsonl or parquet, or "
            "'hub:<dataset id>'"
        )
    if path.is_file():
        return [path]
    known = (*TEXT_SUFFIXES, ".jsonl", ".parquet")
    files = sorted(p for p in path.rglob("*") if p.suffix in known and p.is_file())
    if not files:
        raise ValueError(f"data.source={config.source!r} holds no file ending in {', '.join(known)}")
    return files


def _read_files(config: DataConfig) -> Iterator[str]:
    for path in _files(config):
        if path.suffix == ".jsonl":
            yield from _read_jsonl(path, config)
        elif path.suffix == ".parquet":
            yield from _read_parquet(path, config)
        elif path.suffix in TEXT_SUFFIXES:
            yield _read_text(path)
        else:
            raise ValueError(
                f"data.source={config.source!r}: unknown kind of file {path.suffix!r}; known: "
                f"{', '.join((*TEXT_SUFFIXES, '.jsonl', '.parquet'))}"
            )


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")  # not read_text, which would turn \r\n into \n
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from None


def _read_jsonl(path: Path, config: DataConfig) -> Iterator[str]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number} is not UTF-8 text (byte {error.start}); convert it") from None
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number} is not JSON ({error.msg})") from None
            yield _text_of(record, config, f"{path}:{number}")


def _read_parquet(path: Path, config: DataConfig) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a readable parquet file ({error}); write it again") from None
    if config.text_field not in file.schema_arrow.names:
        _text_of(dict.fromkeys(file.schema_arrow.names), config, str(path))
    for batch in file.iter_batches(columns=[config.text_field]):
        for value in batch.column(0).to_pylist():
            yield _text_of({config.text_field: value}, config, str(path))


def _read_hub(config: DataConfig) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"data.source={config.source!r} needs the package `datasets`, which is not installed; "
            "pip install 'attnzoo[train]', or give a local path"
        ) from None

    name, _, variant = config.source.removeprefix("hub:").partition(":")
    try:
        found = datasets.load_dataset(name, variant or None, split=config.split, streaming=True)
        for record in found:
            yield _text_of(record, config, config.source)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, ValueError) and str(error).startswith("data."):
            raise
        raise ValueError(
            f"data.source={config.source!r}, data.split={config.split!r} cannot be read from the hub "
            f"({type(error).__name__}: {error}); check the id and the network, or give a local path"
        ) from None


def _text_of(record: Any, config: DataConfig, where: str) -> str:
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
