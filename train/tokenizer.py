"""Trains a sentencepiece tokenizer (BPE with byte fallback) that keeps whitespace.

    python -m train.tokenizer --source stdlib --vocab-size 2048 --out tokenizer.model
    python -m train.tokenizer --source my.jsonl --text-field body --vocab-size 8000 --out tokenizer.model

The same corpus and settings give an identical file.
"""

import argparse
import hashlib
import io
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from attnzoo.errors import complain
from attnzoo.files import output_file, user_path, write_atomic
from attnzoo.tokenizer import load_tokenizer
from attnzoo.tokenizer.sentencepiece import SPACE, SentencePieceTokenizer
from train.data.config import DataConfig
from train.data.corpora import fingerprint, split_documents

SAMPLE_BYTES = 4_000_000
"""Bytes of text in the training sample; more would take longer and change few pieces."""
STREAM_BYTES = 64_000_000
"""Bytes of a hub data set from which the sample is taken: only its beginning, because it comes over the network."""
RATIO_BYTES = 1_000_000
"""Length of the text on which the command measures bytes per token."""
LONGEST_LINE = 4096
"""Longer lines are split; in characters."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """vocab_size: number of pieces, with the 256 bytes and 4 control tokens. path: use this trained tokenizer instead,
    a file or directory for `attnzoo.tokenizer.load_tokenizer`."""

    vocab_size: int = 2048
    path: str | None = None

    def __post_init__(self) -> None:
        if not 270 <= self.vocab_size <= 65536:
            raise ValueError(
                f"tokenizer.vocab_size={self.vocab_size} must be between 270 (all bytes, the control tokens and a few "
                "pieces) and 65536"
            )


def ensure_tokenizer(config: TokenizerConfig, data: DataConfig, cache_dir: Path) -> Path:
    """The tokenizer file: `config.path`, or one that is trained on the training split of `data` and kept in
    `cache_dir`. Raises ValueError if it cannot be loaded or trained."""
    if config.path is not None:
        path = user_path(config.path, "tokenizer.path")
        load_tokenizer(path)
        return path
    key = hashlib.sha256(f"{fingerprint(data)} {asdict(config)} {SAMPLE_BYTES}".encode()).hexdigest()[:16]
    path = Path(cache_dir) / "tokenizers" / f"{key}.model"
    if not path.is_file():
        train_tokenizer(sample_lines(training_documents(data), SAMPLE_BYTES), config.vocab_size, path)
    return path


def training_documents(data: DataConfig) -> Iterator[str]:
    """Yields the documents of the training split; of a hub data set about the first STREAM_BYTES bytes."""
    if data.source.startswith("hub:"):
        data = replace(data, max_bytes=min(data.max_bytes or STREAM_BYTES, STREAM_BYTES))
    return (document for is_train, document in split_documents(data) if is_train)


def sample_lines(documents: Iterable[str], most_bytes: int) -> list[str]:
    """A sample of at most `most_bytes` bytes: every k-th line of the whole corpus.

    The corpus is read once and only the sample is held: k doubles whenever the sample is full. Lines longer than
    LONGEST_LINE characters are split.
    """
    chosen: list[str] = []
    step, size = 1, 0
    for number, line in enumerate(_pieces(documents)):
        if number % step:
            continue
        chosen.append(line)
        size += len(line.encode())
        while size > most_bytes and len(chosen) > 1:
            chosen, step = chosen[::2], 2 * step
            size = sum(len(line.encode()) for line in chosen)
    return chosen


def _pieces(documents: Iterable[str]) -> Iterator[str]:
    for document in documents:
        for line in document.split("\n"):
            yield from (line[start : start + LONGEST_LINE] for start in range(0, len(line), LONGEST_LINE))


def train_tokenizer(lines: Iterable[str], vocab_size: int, path: Path) -> Path:
    """Trains on lines of text and writes the model file atomically.

    Raises ValueError if there is no text, or `vocab_size` does not suit it.
    """
    from sentencepiece import SentencePieceTrainer

    # sentencepiece splits sentences at newlines and never learns them; a user-defined symbol adds a piece.
    pieces = (piece for line in lines for piece in line.split("\n") if piece.strip(" ") and SPACE not in piece)
    text = [piece[start : start + LONGEST_LINE] for piece in pieces for start in range(0, len(piece), LONGEST_LINE)]
    if not text:
        raise ValueError("the corpus holds no text to train a tokenizer on; check data.source")
    # Writing to memory keeps sentencepiece from storing the file's path in the model.
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(text),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n"],
            max_sentence_length=4 * LONGEST_LINE,
            pad_id=SentencePieceTokenizer.pad_id,
            bos_id=SentencePieceTokenizer.bos_id,
            eos_id=SentencePieceTokenizer.eos_id,
            unk_id=SentencePieceTokenizer.unk_id,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        size = sum(len(line.encode()) for line in text)
        raise ValueError(
            f"tokenizer.vocab_size={vocab_size} does not suit {size:,} bytes of text: too few pieces for "
            f"its characters, or more than it has to offer ({error})"
        ) from None
    write_atomic(Path(path), model.getvalue())
    return Path(path)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status, 2 after wrong usage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {field.name: field.default for field in fields(DataConfig)}
    parser.add_argument("--source", default=defaults["source"], help="as data.source (default: %(default)s)")
    parser.add_argument("--text-field", default=defaults["text_field"], help="of jsonl, parquet, hub sources")
    parser.add_argument("--vocab-size", type=int, default=2048, help="(default: %(default)s)")
    parser.add_argument("--out", required=True, help="model file to write")
    chosen = parser.parse_args(arguments)
    try:
        out = output_file(chosen.out, "--out")
        data = DataConfig(source=chosen.source, text_field=chosen.text_field)
        config = TokenizerConfig(vocab_size=chosen.vocab_size)
        start = time.perf_counter()
        head: list[str] = []
        train_tokenizer(sample_lines(_noted(training_documents(data), head), SAMPLE_BYTES), config.vocab_size, out)
    except ValueError as error:
        return complain("train.tokenizer", str(error))
    tokenizer, sample = SentencePieceTokenizer.load(out), "\n".join(head)[:RATIO_BYTES]
    ratio = len(sample.encode()) / len(tokenizer.encode(sample))
    print(
        f"{chosen.out}: {tokenizer.vocab_size} pieces, {ratio:.2f} bytes per token, {time.perf_counter() - start:.1f} s"
    )
    return 0


def _noted(documents: Iterable[str], head: list[str]) -> Iterator[str]:
    """Yields the documents, and appends their first RATIO_BYTES characters to `head`."""
    noted = 0
    for document in documents:
        if noted < RATIO_BYTES:
            head.append(document[:RATIO_BYTES])
            noted += len(document)
        yield document


if __name__ == "__main__":
    sys.exit(main())
