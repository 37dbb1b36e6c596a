"""A text as character ids, split into training and validation, and read as parallel streams."""

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from attnzoo.files import user_path

VALIDATION_TENTHS = 1
STDLIB, STDLIB_CHARS = "stdlib", 1_000_000


@dataclass(frozen=True)
class Text:
    """train, validation: ids of the first nine tenths and of the last tenth. characters: in order of their ids."""

    characters: str
    train: Tensor
    validation: Tensor

    @property
    def vocab_size(self) -> int:
        """Number of distinct characters in the whole text, as in the RCMHA authors' code."""
        return len(self.characters)


def load_text(path: str, validation_chars: int = 0) -> Text:
    """Reads a UTF-8 file, or "stdlib". validation_chars: characters of the validation part to keep (0: all).

    Raises ValueError if the file does not exist, is not UTF-8, or is too short to split.
    """
    try:
        text = standard_library() if path == STDLIB else user_path(path, "text").read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"text={path}: {error.strerror}; give a text file with text=PATH (the paper's is tiny-shakespeare, the "
            f"input.txt of karpathy/char-rnn), or text={STDLIB}"
        ) from None
    except UnicodeDecodeError:
        raise ValueError(f"text={path} is not UTF-8 text; convert it, or give another file") from None
    characters = "".join(sorted(set(text)))
    if len(text) < 1000 or len(characters) < 2:
        raise ValueError(f"text={path} has {len(text)} characters; at least 1000 are needed to split it 90/10")
    index = {character: i for i, character in enumerate(characters)}
    ids = torch.tensor([index[character] for character in text])
    cut = len(ids) * (10 - VALIDATION_TENTHS) // 10
    validation = ids[cut:]
    return Text(characters, ids[:cut], validation[:validation_chars] if validation_chars else validation)


def standard_library() -> str:
    """The first STDLIB_CHARS characters of the modules of Python's standard library, in order of their names, without
    modules that are not ASCII, which would enlarge the vocabulary."""
    parts, total = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        content = path.read_bytes()
        if content.isascii():
            parts.append(content.decode("ascii"))
            total += len(content)
        if total >= STDLIB_CHARS:
            break
    return "\n".join(parts)[:STDLIB_CHARS]


def streams(ids: Tensor, batch: int, segment: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (tokens_BT, targets_BT) without end: `batch` streams that begin at evenly spread places of the text.

    The text is a ring, and the seed determines where the first stream begins. Segment n+1 of a row continues segment n,
    as a carried state requires. Raises ValueError if the text is shorter than a segment.
    """
    length = len(ids)
    if length < segment + 1:
        raise ValueError(f"the text has {length} characters, too few for segments of {segment}")
    offset = int(torch.randint(length, (1,), generator=torch.Generator().manual_seed(seed)))
    starts_B1 = (torch.arange(batch) * length // batch + offset)[:, None]
    reach_T = torch.arange(segment + 1)
    while True:
        rows_BT = ids[(starts_B1 + reach_T) % length]
        yield rows_BT[:, :-1], rows_BT[:, 1:]
        starts_B1 = (starts_B1 + segment) % length


def windows(ids: Tensor, length: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (tokens_BT, targets_BT) of consecutive windows of `length` characters; every character but the first is a
    target once. A shorter last window comes in a batch of its own.
    """
    whole = (len(ids) - 1) // length
    tokens = ids[: whole * length].view(whole, length)
    targets = ids[1 : whole * length + 1].view(whole, length)
    yield from zip(tokens.split(batch), targets.split(batch), strict=True)
    rest = ids[whole * length :]
    if len(rest) > 1:
        yield rest[None, :-1], rest[None, 1:]
