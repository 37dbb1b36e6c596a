"""What tests of training data share: documents of a few words, and a corpus of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from train.data import DataConfig

WORDS = [
    "the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "while", "seven", "wizards", "boil", "tea",
]  # fmt: skip


def text(number: int) -> str:
    """A document: 40 drawn words, and a line that is its own."""
    random = np.random.default_rng(number)
    return " ".join(random.choice(WORDS, size=40)) + f"\nend of document {number}\n"


def write_corpus(directory: Path) -> Path:
    """A jsonl of 60 documents, two of them equal."""
    path = directory / "corpus.jsonl"
    lines = [json.dumps({"id": n, "text": text(n if n != 7 else 8)}) for n in range(60)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def config(path: str | Path, **changes: Any) -> DataConfig:
    """Settings for a corpus of that size."""
    return DataConfig(**({"source": str(path), "sequence_length": 16, "validation_fraction": 0.2} | changes))
