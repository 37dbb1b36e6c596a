"""Reads documents from any source, and splits them into training and validation."""

import hashlib
import itertools
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from train.data.account import Account
from train.data.config import DataConfig
from train.data.files import MARK, find_files, read_files, text_of
from train.data.retrieval import SOURCE, retrieval_documents

READING = 2
"""Version of the rules for reading sources. After a change, prepared tokens and tokenizers are made anew."""
FEW_DOCUMENTS = 20
"""With fewer documents each document is split, because whole documents would be too coarse."""


def split_documents(config: DataConfig, account: Account | None = None) -> Iterator[tuple[bool, str]]:
    """Yields (is_train, document) for every distinct document in the order of the source, and counts in `account`.

    The content and the seed determine a document's side. So no document is on both sides, and new documents do not move
    old ones. Raises the ValueError of `documents`.
    """
    account = Account() if account is None else account
    found = _distinct(documents(config, account), account)
    first = list(itertools.islice(found, FEW_DOCUMENTS))
    if len(first) < FEW_DOCUMENTS:
        yield from itertools.chain.from_iterable(split_by_position(document, config) for document in first)
        return
    for document in itertools.chain(first, found):
        digest = hashlib.sha256(f"{config.seed} {document}".encode()).digest()
        yield int.from_bytes(digest[:8], "big") >= config.validation_fraction * 2**64, document


def split_by_position(document: str, config: DataConfig) -> Iterator[tuple[bool, str]]:
    """Splits a document: its beginning is for training, its end for validation. Yields no empty part.

    The cut moves back to the start of a line, or else of a word, if that is at most half the validation part away.
    """
    cut = int(len(document) * (1 - config.validation_fraction))
    nearest = max(0, cut - (len(document) - cut) // 2)
    for separator in ("\n", " "):
        place = document.rfind(separator, nearest, cut) + 1
        if place:
            cut = place
            break
    yield from ((is_train, part) for is_train, part in ((True, document[:cut]), (False, document[cut:])) if part)


def _distinct(found: Iterator[str], account: Account) -> Iterator[str]:
    seen = set()
    for document in found:
        digest = hashlib.sha256(document.encode()).digest()
        if not document:
            account.empty += 1
        elif digest in seen:
            account.duplicates += 1
        else:
            seen.add(digest)
            account.documents += 1
            yield document


def documents(config: DataConfig, account: Account | None = None) -> Iterator[str]:
    """Yields the documents of the source, up to about max_bytes bytes. Raises ValueError that names the source."""
    account = Account() if account is None else account
    read = 0
    for document in _read(config, account):
        # UTF-8 cannot encode unpaired surrogates (from JSON escapes); a byte order mark is not part of the text.
        document = document.lstrip(MARK).encode("utf-8", errors="replace").decode("utf-8")
        yield document
        read += len(document.encode())
        if config.max_bytes is not None and read >= config.max_bytes:
            account.complete = False
            return
    if read == 0:
        raise ValueError(f"data.source={config.source!r} holds no text")


def fingerprint(config: DataConfig) -> str:
    """A string that changes when the source's text may have changed: from the metadata of its files, or the hub id.

    It includes each file's ctime, which, unlike mtime, cannot be set back.
    """
    parts = [str(READING), config.source, config.text_field, config.split, str(config.max_bytes)]
    parts += [str(config.validation_fraction), str(config.seed)]
    if config.source == SOURCE or config.source.startswith("hub:"):
        return " ".join(parts)
    files = _stdlib_files() if config.source == "stdlib" else find_files(config)
    stamps = ((str(path), *_stamp(path)) for path in files)
    return " ".join([*parts, sys.version.split()[0], hashlib.sha256(repr(list(stamps)).encode()).hexdigest()])


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); take it out of data.source") from None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read(config: DataConfig, account: Account) -> Iterator[str]:
    if config.source == "stdlib":
        return _read_stdlib(account)
    if config.source == SOURCE:
        return retrieval_documents(config)
    if config.source.startswith("hub:"):
        return _read_hub(config)
    return read_files(config, account)


def _stdlib_files() -> list[Path]:
    """The source files of Python's standard library without tests: about 700 files, 12 MB."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return sorted(p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts))


def _read_stdlib(account: Account) -> Iterator[str]:
    for path in _stdlib_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few modules declare another encoding
            account.skip(path.name, "not UTF-8")
            continue
        account.files += 1
        yield text


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
            yield text_of(record, config, config.source)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, ValueError) and str(error).startswith("data."):
            raise
        raise ValueError(
            f"data.source={config.source!r}, data.split={config.split!r} cannot be read from the hub "
            f"({type(error).__name__}: {' '.join(str(error).split())}); check the id and the network, or give a local "
            "path"
        ) from None
