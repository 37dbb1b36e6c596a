"""Token files: built once by one process, and memory-mapped by all."""

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from attnzoo.files import replace_directory, temporary_directory
from attnzoo.tokenizer import Tokenizer, load_tokenizer
from train.bar import Bar
from train.data.account import Account, account_line
from train.data.base import IGNORED
from train.data.config import DataConfig
from train.data.corpora import fingerprint, split_documents
from train.data.loader import BatchStream
from train.data.retrieval import SOURCE, TaskData, prepare_tasks

FORMAT = 2
SIDES = ("train", "validation")


@dataclass
class TokenData:
    """Training and validation tokens of a corpus with a tokenizer."""

    train: BatchStream
    validation_tokens: np.ndarray
    sequence_length: int
    token_bytes: Tensor
    """Number of UTF-8 bytes of every token in the vocabulary; 0 for begin and end tokens."""
    num_train_tokens: int
    num_train_bytes: int
    num_validation_bytes: int
    digest: str
    account: dict[str, Any]

    def validation_blocks(self, most: int | None = None) -> tuple[Tensor, Tensor]:
        """(tokens_NT, targets_NT), int64: consecutive blocks; every token but the first and an incomplete block's is a
        target once. most: so many blocks, spread evenly over the text (None: all)."""
        tokens_NT, targets_NT = blocks_of(self.validation_tokens, self.sequence_length)
        if most is None or most >= len(tokens_NT):
            return tokens_NT, targets_NT
        chosen = torch.arange(most) * len(tokens_NT) // most
        return tokens_NT[chosen], targets_NT[chosen]

    def bytes_per_token(self, targets_NT: Tensor) -> float:
        """Mean number of UTF-8 bytes of a target that counts: bits per byte = nats per target / ln 2 / this number.

        Begin and end tokens count as targets of 0 bytes, so that a model pays for predicting where a document ends.
        """
        counted = targets_NT[targets_NT != IGNORED]
        return int(self.token_bytes[counted].sum()) / counted.numel()


def bits_per_byte(loss_nats: float, bytes_per_token: float) -> float:
    """Converts a mean loss per token in nats to bits per byte of text, which is comparable between tokenizers."""
    return loss_nats / math.log(2) / bytes_per_token


def blocks_of(tokens: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
    """(inputs_NT, targets_NT): complete blocks of `length` tokens, and the tokens that follow each."""
    count = (len(tokens) - 1) // length
    flat = torch.from_numpy(tokens[: count * length + 1].astype(np.int64))
    return flat[:-1].view(count, length), flat[1:].view(count, length)


def prepare(
    config: DataConfig, tokenizer_path: Path, cache_dir: Path, *, is_main: bool, progress: bool = True
) -> TokenData | TaskData:
    """Opens the tokens of the corpus; the main process builds them first if they do not exist.

    The other processes must call this after the main one. Generated tasks are not stored. Raises the ValueError of
    `split_documents`, and ValueError if a split is shorter than a block or there are no tokens on another process.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    if config.source == SOURCE:
        return prepare_tasks(config, tokenizer)
    if config.isolate_documents and tokenizer.encode("", bos=True) == []:
        raise ValueError(
            "data.isolate_documents=true needs a tokenizer whose texts have a begin token; this one's have none: set "
            "it to false"
        )
    directory = _cache_directory(config, tokenizer, cache_dir)
    if not directory.is_dir():
        if not is_main:
            raise ValueError(f"no prepared tokens in {directory}; prepare them in the main process first")
        _build(config, tokenizer, directory, progress)
    about = read_about(directory, whole=is_main)
    if is_main and progress:
        tqdm.write(account_line(config.source, about["account"]), file=sys.stderr)
    tokens = {side: np.memmap(directory / f"{side}.bin", dtype=about["dtype"], mode="r") for side in SIDES}
    for side in SIDES:
        if len(tokens[side]) <= config.sequence_length:
            raise ValueError(
                f"the {side} split of data.source={config.source!r} has {len(tokens[side])} tokens, fewer than one "
                f"block of data.sequence_length={config.sequence_length}; give more text or shorter sequences"
            )
    return TokenData(
        train=BatchStream(tokens["train"], config.sequence_length, config.seed),
        validation_tokens=tokens["validation"],
        sequence_length=config.sequence_length,
        token_bytes=torch.tensor([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)]),
        num_train_tokens=len(tokens["train"]),
        num_train_bytes=about["train"]["text_bytes"],
        num_validation_bytes=about["validation"]["text_bytes"],
        digest=hashlib.sha256("".join(about[side]["sha256"] for side in SIDES).encode()).hexdigest()[:16],
        account=about["account"],
    )


def read_about(directory: Path, whole: bool) -> dict[str, Any]:
    """The content of about.json, after a check of the token files' sizes and, with `whole`, of their contents.

    Raises ValueError that names the damaged file.
    """
    mend = f"delete {directory} and start again: it is prepared anew"
    try:
        about = json.loads((directory / "about.json").read_text(encoding="utf-8"))
        for side in SIDES:
            path, wanted = directory / f"{side}.bin", about[side]
            size = path.stat().st_size
            if size != wanted["tokens"] * np.dtype(about["dtype"]).itemsize:
                raise ValueError(f"{path} is damaged: it has {size:,} bytes, not {wanted['tokens']:,} tokens; {mend}")
            if whole and _digest(path) != wanted["sha256"]:
                raise ValueError(f"{path} is damaged: its content is not what was prepared; {mend}")
        account_line("", about["account"])
    except (OSError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"the prepared tokens are damaged ({type(error).__name__}: {error}); {mend}") from None
    return about


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cache_directory(config: DataConfig, tokenizer: Tokenizer, cache_dir: Path) -> Path:
    same_tokens = ("sequence_length", "isolate_documents")
    settings = {key: value for key, value in asdict(config).items() if key not in same_tokens}
    key = hashlib.sha256(f"{FORMAT} {fingerprint(config)} {settings} {tokenizer.fingerprint()}".encode()).hexdigest()[
        :16
    ]
    return Path(cache_dir) / "tokens" / key


def _build(config: DataConfig, tokenizer: Tokenizer, directory: Path, progress: bool) -> None:
    """Builds the tokens and moves the complete directory into place; removes it after a failure. Raises ValueError."""
    temporary = None
    try:
        temporary = temporary_directory(directory)
        _write_tokens(config, tokenizer, temporary, progress)
        replace_directory(temporary, directory)
    except OSError as error:
        raise ValueError(
            f"the tokens of data.source={config.source!r} cannot be written to {directory} "
            f"({error.strerror or error}); make room there, or set cache_dir to another directory"
        ) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


class _Side:
    """Writes the tokens of one split to a file, and counts them."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.file, self.dtype, self.hash = path.open("wb"), dtype, hashlib.sha256()
        self.tokens, self.text_bytes = 0, 0

    def write(self, ids: list[int], document: str) -> None:
        data = np.array(ids, dtype=self.dtype).tobytes()
        self.file.write(data)
        self.hash.update(data)
        self.tokens += len(ids)
        self.text_bytes += len(document.encode())

    def about(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "text_bytes": self.text_bytes, "sha256": self.hash.hexdigest()}


def _write_tokens(config: DataConfig, tokenizer: Tokenizer, temporary: Path, progress: bool) -> None:
    """Writes train.bin, validation.bin and about.json."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    sides, account = {name: _Side(temporary / f"{name}.bin", dtype) for name in SIDES}, Account()
    try:
        for side, document in _with_progress(split_documents(config, account), progress):
            sides[side].write(tokenizer.encode(document, bos=True, eos=True), document)
    finally:
        for written in sides.values():
            written.file.close()
    for name, written in sides.items():
        if written.tokens == 0:
            raise ValueError(
                f"no document of data.source={config.source!r} fell to {name}; give more text or another "
                f"data.validation_fraction than {config.validation_fraction}"
            )
    about = {name: written.about() for name, written in sides.items()}
    content = {"dtype": dtype.name, **about, "account": account.to_dict()}
    (temporary / "about.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _with_progress(documents: Iterator[tuple[bool, str]], progress: bool) -> Iterator[tuple[str, str]]:
    with Bar(desc="tokenizing", unit="B", unit_scale=True, disable=not progress) as bar:
        for is_train, document in documents:
            yield "train" if is_train else "validation", document
            bar.update(len(document.encode()))
