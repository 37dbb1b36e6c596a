"""The run of a checked call of `generate`: all steps of the model, from token ids to texts."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from attnzoo.attention.edits import EditPlan, EditRun
from attnzoo.generation.results import Continuation, Generation, Writer
from attnzoo.kvcache import CachePolicy
from attnzoo.models import DecoderLM, GenerationConfig, Sequences
from attnzoo.tokenizer import Tokenizer
from attnzoo.tokenizer.text_stream import TextStream

T = TypeVar("T")
TokenPrompt = tuple[str | None, Sequence[int]]
"""(the text if one was given, its token ids or an `EmbeddedPrompt`)."""


@dataclass(frozen=True)
class GenerationTask:
    """One call of `generate`. limits: most new tokens of each. cache: None is exact. plans:
    what is read and edited of attention, None: nothing."""

    prompts: list[TokenPrompt]
    limits: list[int]
    config: GenerationConfig
    cache: CachePolicy | None
    plans: list[EditPlan] | None = None


def run_batched(model: DecoderLM, tokenizer: Tokenizer, task: GenerationTask, batch_size: int) -> list[Generation]:
    """All prompts, `batch_size` sequences at a time."""
    found: list[Generation] = []
    each = max(1, batch_size // task.config.n)
    for first in range(0, len(task.prompts), each):
        part = slice(first, first + each)
        plans = None if task.plans is None else task.plans[part]
        some = replace(task, prompts=task.prompts[part], limits=task.limits[part], plans=plans)
        found += _drained(run_task(model, tokenizer, some))
    return found


def run_task(model: DecoderLM, tokenizer: Tokenizer, task: GenerationTask) -> Generator[str, None, list[Generation]]:
    """Yields the text pieces of all sequences as they become final; returns the generations."""
    config, stop_ids = task.config, frozenset() if task.config.ignore_eos else tokenizer.stop_ids
    writers = [
        Writer(TextStream(tokenizer, config.stop), limit, stop_ids) for limit in task.limits for _ in range(config.n)
    ]
    done: dict[int, Continuation] = {}
    runs = None if task.plans is None else [EditRun(plan) for plan in task.plans]
    sequences = Sequences(
        model,
        [ids for _, ids in task.prompts],
        replace(config, max_new_tokens=max(task.limits)),
        cache=task.cache,
        vocab_size=tokenizer.vocab_size,
        edits=runs,
    )
    while sequences.running:
        for row, token, logprobs in sequences.step():
            piece = writers[row].push(token, logprobs)
            if writers[row].ended:
                use = sequences.cache_use(row)
                done[row] = writers[row].continuation(use, config.logprobs is not None)
                sequences.end(row)
            if piece:
                yield piece
    rows = [done[row] for row in range(len(writers))]
    readings = [None] * len(task.prompts) if runs is None else [run.reading for run in runs]
    return [
        Generation(text, tuple(ids), tuple(rows[index * config.n : (index + 1) * config.n]), readings[index])
        for index, (text, ids) in enumerate(task.prompts)
    ]


def _drained(pieces: Generator[str, None, T]) -> T:
    """Runs a generator to its end and returns its return value; what it yields is dropped."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            found: T = end.value
            return found
