"""Tokens on disk: built once by one process, mapped into memory by all."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from attnzoo.files import replace_directory, temporary_directory
from attnzoo.tokenizer import Tokenizer, load_tokenizer
from train.data.base import IGNORED
from train.data.config import DataConfig
from train.data.corpora import fingerprint, split_documents
from train.data.loader import BatchStream
from train.data.retrieval import SOURCE, TaskData, prepare_tasks

FORMAT = 1
SIDES = ("train", "validation")


@dataclass
class TokenData:
    """Training and validation tokens of one corpus under one tokenizer."""

    train: BatchStream
    validation_tokens: np.ndarray
    sequence_length: int
    token_bytes: Tensor
    """UTF-8 bytes of every token of the vocabulary; none for begin and end of a document."""
    num_train_tokens: int
    num_train_bytes: int
    num_validation_bytes: int

    def validation_blocks(self, most: int | None = None) -> tuple[Tensor, Tensor]:
        """(tokens_NT, targets_NT): blocks side by side; every token but the first and a rest is a target once.

        `most`: that many of them, spread evenly over the text.
        """
        tokens_NT, targets_NT = blocks_of(self.validation_tokens, self.sequence_length)
        if most is None or most >= len(tokens_NT):
            return tokens_NT, targets_NT
        chosen = torch.arange(most) * len(tokens_NT) // most
        return tokens_NT[chosen], targets_NT[chosen]

    def bytes_per_token(self, targets_NT: Tensor) -> float:
        """UTF-8 bytes per target that counts: bits per byte = nats per target / ln 2 / bytes per target.

        Targets without bytes count as targets, so a model pays for predicting where a document ends.
        """
        counted = targets_NT[targets_NT != IGNORED]
        return int(self.token_bytes[counted].sum()) / counted.numel()


def blocks_of(tokens: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
    """Whole blocks of inputs and of the tokens that follow them."""
    count = (len(tokens) - 1) // length
    flat = torch.from_numpy(tokens[: count * length + 1].astype(np.int64))
    return flat[:-1].view(count, length), flat[1:].view(count, length)


def prepare(
    config: DataConfig, tokenizer_path: Path, cache_dir: Path, *, is_main: bool, progress: bool = True
) -> TokenData | TaskData:
    """Opens the tokens of the corpus; the main process builds them first if they are not there.

    The other processes call this after the main one. Generated tasks are not stored. Raises ValueError as
    `split_documents`, when a split is shorter than a block, or when a process that is not the main one finds nothing.
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
    about = json.loads((directory / "about.json").read_text(encoding="utf-8"))
    dtype = np.dtype(about["dtype"])
    tokens = {side: np.memmap(directory / f"{side}.bin", dtype=dtype, mode="r") for side in SIDES}
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
        num_train_bytes=about["train_bytes"],
        num_validation_bytes=about["validation_bytes"],
    )


def _cache_directory(config: DataConfig, tokenizer: Tokenizer, cache_dir: Path) -> Path:
    same_tokens = ("sequence_length", "isolate_documents")
    settings = {key: value for key, value in asdict(config).items() if key not in same_tokens}
    key = hashlib.sha256(f"{FORMAT} {fingerprint(config)} {settings} {tokenizer.fingerprint()}".encode()).hexdigest()[
        :16
    ]
    return Path(cache_dir) / "tokens" / key


def _build(config: DataConfig, tokenizer: Tokenizer, directory: Path, progress: bool) -> None:
    """The directory appears only when it is whole; what an interrupted build wrote is removed."""
    temporary = temporary_directory(directory)
    try:
        _write_tokens(config, tokenizer, temporary, progress)
        replace_directory(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_tokens(config: DataConfig, tokenizer: Tokenizer, temporary: Path, progress: bool) -> None:
    """Writes train.bin, validation.bin and about.json."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    num_bytes = dict.fromkeys(SIDES, 0)
    with (temporary / "train.bin").open("wb") as train, (temporary / "validation.bin").open("wb") as validation:
        for side, document in _with_progress(split_documents(config), progress):
            ids = tokenizer.encode(document, bos=True, eos=True)
            (train if side == "train" else validation).write(np.array(ids, dtype=dtype).tobytes())
            num_bytes[side] += len(document.encode())
    about = {"dtype": dtype.name, "train_bytes": num_bytes["train"], "validation_bytes": num_bytes["validation"]}
    (temporary / "about.json").write_text(json.dumps(about), encoding="utf-8")
    for side in SIDES:
        if num_bytes[side] == 0:
            raise ValueError(
                f"no document of data.source={config.source!r} fell to {side}; give more text or another "
                f"data.validation_fraction than {config.validation_fraction}"
            )


def _with_progress(documents: Iterator[tuple[bool, str]], progress: bool) -> Iterator[tuple[str, str]]:
    with tqdm(desc="tokenizing", unit="B", unit_scale=True, disable=not progress) as bar:
        for is_train, document in documents:
            yield "train" if is_train else "validation", document
            bar.update(len(document.encode()))
