"""Generated retrieval tasks as training data, for the small model with which compressed caches are measured.

A document is a context of `attnzoo.tasks.symbols` and its questions. Each question occurs once, because a second time
it could be answered from the first answer. Documents are concatenated into sequences. Targets are the answers and, as
an intermediate step without which chains are not learned, the value of a variable where it is assigned. An index
determines its sequence, so that nothing is stored.
"""

import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnzoo.tasks.examples import answered
from attnzoo.tasks.symbols import ALPHABET, SYMBOL_TASKS, symbol_example, symbol_tokens
from attnzoo.tokenizer import Tokenizer
from train.data.base import IGNORED
from train.data.config import DataConfig

SOURCE = "retrieval"
VALIDATION_SEQUENCES = 256
SHORTEST_CONTEXT = 80
"""Length of the shortest context in symbols; the items of every task fit."""
WEIGHTS = {task: 2 if task == "variables" else 1 for task in SYMBOL_TASKS}
"""Relative frequency of the tasks. Variables, whose values need up to three look-ups, are the hardest to learn."""


def retrieval_documents(config: DataConfig) -> Iterator[str]:
    """Yields the alphabet many times, from which a tokenizer learns all symbols alike."""
    yield f" {ALPHABET}\n" * 100


def task_document(longest: int, rng: random.Random, bos: int, tokens: list[int]) -> tuple[list[int], list[int]]:
    """(tokens, targets) of a document: a begin token, a context of at most `longest` symbols, and its questions. A
    target is the token to predict at a position, or -100."""
    (task,) = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
    context = rng.randint(SHORTEST_CONTEXT, max(SHORTEST_CONTEXT, longest))
    example = symbol_example(task, context, rng.getrandbits(64)).translated(tokens).after((bos,))
    questions, asked = answered(example.questions)
    answers = [token if told else IGNORED for token, told in zip(questions, asked, strict=True)]
    targets = [IGNORED] * (len(example.body) - 1) + answers + [IGNORED]
    if task == "variables":
        for question in example.questions:
            # The assignment of the question's variable ends at the last place that the answer depends on.
            targets[question.places[-1]] = question.answer[0]
    return [*example.body, *questions], targets


def task_sequence(length: int, index: str, bos: int, tokens: list[int]) -> tuple[list[int], list[int]]:
    """(tokens, targets) of a sequence of `length` tokens: concatenated documents, the last one cut."""
    rng = random.Random(index)
    sequence: list[int] = []
    targets: list[int] = []
    while len(sequence) < length:
        more, told = task_document(3 * length // 5, rng, bos, tokens)
        sequence += more
        targets += told
    return sequence[:length], targets[:length]


class TaskStream:
    """Training batches: sequence n of the stream is at place n of the concatenated global batches."""

    def __init__(self, bos: int, tokens: list[int], length: int, seed: int) -> None:
        """tokens: the token id of every symbol. length: tokens of a sequence."""
        self._bos, self._tokens, self._length, self._seed, self._used = bos, tokens, length, seed, 0

    def next(self, batch_size: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
        """(tokens_BT, targets_BT), int64, for process `rank`; targets are -100 except at answers."""
        first = self._used + rank * batch_size
        self._used += batch_size * world
        indices = [f"{self._seed} {index}" for index in range(first, first + batch_size)]
        return task_block(self._bos, self._tokens, self._length, indices)

    def state(self) -> dict[str, int]:
        """The position in the stream."""
        return {"used": self._used}

    def load(self, state: Mapping[str, int]) -> None:
        """Continues from a position that `state` has returned."""
        self._used = int(state["used"])


def task_block(bos: int, tokens: list[int], length: int, indices: list[str]) -> tuple[Tensor, Tensor]:
    """(tokens_BT, targets_BT), int64, of the sequences with these indices."""
    rows = [task_sequence(length, index, bos, tokens) for index in indices]
    return torch.tensor([sequence for sequence, _ in rows]), torch.tensor([targets for _, targets in rows])


@dataclass
class TaskData:
    """Generated training and validation sequences; a symbol is a byte of text."""

    train: TaskStream
    sequence_length: int
    validation: tuple[Tensor, Tensor]
    num_train_tokens: int = 1
    num_train_bytes: int = 1
    account: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """A digest of the validation sequences, which the same generator makes as the training data."""
        return hashlib.sha256(b"".join(part.numpy().tobytes() for part in self.validation)).hexdigest()[:16]

    def validation_blocks(self, most: int | None = None) -> tuple[Tensor, Tensor]:
        """(tokens_NT, targets_NT): all of the validation sequences, or the first `most`."""
        tokens_NT, targets_NT = self.validation
        return tokens_NT[:most], targets_NT[:most]

    def bytes_per_token(self, targets_NT: Tensor) -> float:
        """1.0: every symbol is one byte."""
        return 1.0


def prepare_tasks(config: DataConfig, tokenizer: Tokenizer) -> TaskData:
    """Training data of the tasks. Raises ValueError if sequences are too short for a context and its questions, without
    data.isolate_documents, and for a tokenizer without a begin token or without a token for each symbol."""
    check_tasks(config)
    if tokenizer.bos_id is None:
        raise ValueError(f"data.source={SOURCE!r} needs a tokenizer that has a begin token; this one's texts have none")
    bos, tokens = tokenizer.bos_id, symbol_tokens(tokenizer.encode)
    indices = [f"validation {index}" for index in range(VALIDATION_SEQUENCES)]
    return TaskData(
        TaskStream(bos, tokens, config.sequence_length, config.seed),
        config.sequence_length,
        task_block(bos, tokens, config.sequence_length, indices),
    )


def check_tasks(config: DataConfig) -> None:
    """Makes the checks of `prepare_tasks` that do not need the tokenizer. Raises ValueError."""
    if config.sequence_length < 2 * SHORTEST_CONTEXT:
        raise ValueError(
            f"data.sequence_length={config.sequence_length} is too short for data.source={SOURCE!r}: a context takes "
            f"{SHORTEST_CONTEXT} tokens and questions as many; give at least {2 * SHORTEST_CONTEXT}"
        )
    if not config.isolate_documents:
        raise ValueError(
            f"data.isolate_documents={config.isolate_documents}: documents of data.source={SOURCE!r} use the same "
            "symbols for other things, so a sequence must keep them apart; set it to true"
        )
