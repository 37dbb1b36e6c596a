"""Measures decoding with a long context: the speed of every policy, and the speed that the bytes it reads allow.

One random prompt is read in chunks and compressed, and its state is repeated to a batch; a prompt for each sequence
would take much longer and give the same speeds. A batch's state exists only during its policy's turn, because those of
all policies together would not fit in memory. Steps are timed without and, where possible, with compilation; the faster
form counts.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.kvcache import CachePolicy
from attnzoo.models import CompiledDecode, DecoderLM, can_pack, pack_weights
from attnzoo.ops.common.cost import OpCost
from scripts.caches.protocol import Prefill, prefill
from scripts.caches.roofline import attention_cost
from scripts.caches.step_parts import StepParts, step_parts


@dataclass(frozen=True, kw_only=True)
class SpeedSizes:
    """context: tokens of the prompt. batches: numbers of sequences. steps: decode steps of a turn. turns: of each
    policy. chunk: tokens of a prompt chunk. compiled: also time compiled steps."""

    context: int = 8192
    batches: tuple[int, ...] = (16, 32)
    steps: int = 8
    turns: int = 4
    chunk: int = 512
    compiled: bool = True


NOTHING, UNKNOWN = OpCost(bytes_read=0, bytes_written=0, flops=0), StepParts()


@dataclass(frozen=True, kw_only=True)
class Speed:
    """step_seconds: of a decode step of all sequences, median of the best turn in the faster form. state_bytes,
    peak_bytes: of one sequence, after compression and at the peak of prefill. weight_bytes: read in a step. dtype: of
    weights and state. attention: cost of attention and merging in a step, for all sequences. parts: of step_seconds.
    operator_seconds: of a step without compilation; None if steps cannot be compiled."""

    step_seconds: float
    state_bytes: int
    peak_bytes: int
    weight_bytes: int
    batch: int
    dtype: str
    attention: OpCost = NOTHING
    parts: StepParts = UNKNOWN
    operator_seconds: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens per second of all sequences together."""
        return self.batch / self.step_seconds

    @property
    def read_bytes(self) -> int:
        """Bytes that a step must read: the weights, and the state of every sequence."""
        return self.weight_bytes + self.batch * self.state_bytes

    @property
    def read_rate(self) -> float:
        """`read_bytes` per second of a step."""
        return self.read_bytes / self.step_seconds

    def sequences_in(self, memory: int) -> int:
        """Number of sequences that fit in `memory` bytes, when one is being read (and needs its peak) and the others
        are compressed."""
        if memory < self.peak_bytes:
            return 0
        return 1 + (memory - self.peak_bytes) // self.state_bytes


def weight_bytes(model: DecoderLM) -> int:
    """Bytes of the weights that a decode step reads, without an untied embedding, of which it reads only rows."""
    read = {id(p): p.nbytes for p in model.parameters()}
    if not model.config.tie_embeddings:
        read.pop(id(model.embedding.weight))
    return sum(read.values())


@torch.inference_mode()
def measure_speed(
    model: DecoderLM, policies: dict[str, CachePolicy], sizes: SpeedSizes, say: Callable[[str], None]
) -> dict[int, dict[str, Speed]]:
    """Speeds by number of sequences and policy; the policies take turns. say: called with a line of progress.

    As in serving, it runs in inference mode, and packs the weights in place if the CPU supports it.
    """
    if can_pack(model):
        pack_weights(model)
    generator = torch.Generator().manual_seed(0)
    prompt_1T = torch.randint(model.config.vocab_size, (1, sizes.context), generator=generator)
    read: dict[str, Prefill] = {}
    for name, policy in policies.items():
        begin = time.perf_counter()
        read[name] = prefill(model, prompt_1T, policy, chunk=sizes.chunk, room=sizes.steps + 1 + PROFILED)
        say(f"{name}: prompt of {sizes.context} tokens read in {time.perf_counter() - begin:.1f} s")
    turns: dict[tuple[int, str, str], list[tuple[float, StepParts]]] = defaultdict(list)
    forms: dict[str, dict[str, Step]] = {name: {OPERATORS: model.extend_hidden} for name in policies}
    if sizes.compiled:
        _add_compiled(forms, model, policies, say)
    tokens_B1 = torch.randint(model.config.vocab_size, (max(sizes.batches), 1), generator=generator)
    for batch in sizes.batches:
        for turn in range(sizes.turns):
            for name, form in [(name, form) for name, steps in forms.items() for form in steps]:
                took = _turn(model, forms[name][form], read[name].state, tokens_B1[:batch], sizes.steps)
                turns[batch, name, form].append(took)
                which = f"{batch} sequences, turn {turn + 1} of {sizes.turns}, {name}{form}"
                say(f"{which}: {1000 * took[0]:.1f} ms a step")
    return {
        batch: {
            name: _speed(model, done, batch, {form: turns[batch, name, form] for form in forms[name]})
            for name, done in read.items()
        }
        for batch in sizes.batches
    }


Step = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""A decode step: (tokens_B1, state) -> (hidden_B1D, state)."""
OPERATORS, COMPILED = "", ", compiled"


def _add_compiled(
    forms: dict[str, dict[str, Step]], model: DecoderLM, policies: dict[str, CachePolicy], say: Callable[[str], None]
) -> None:
    for name, policy in policies.items():
        try:
            forms[name][COMPILED] = CompiledDecode(model, policy)
        except ValueError as reason:
            say(f"{name} is not compiled: {reason}")


PROFILED = 2
"""Additional steps of a turn under the profiler."""


def _turn(model: DecoderLM, step: Step, state_1: Any, tokens_B1: Tensor, steps: int) -> tuple[float, StepParts]:
    """(median seconds of a step, its parts) for as many sequences as tokens, all with the state of one sequence."""
    state = state_1.map(lambda _, tensor: tensor.repeat_interleave(len(tokens_B1), dim=0))
    seconds = []

    def once() -> None:
        nonlocal state
        hidden_B1D, state = step(tokens_B1, state)
        model.logits(hidden_B1D)

    for _ in range(steps + 1):
        begin = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - begin)
    # The first step may allocate memory and compile.
    median = statistics.median(seconds[1:])

    def run() -> None:
        for _ in range(PROFILED):
            once()

    return median, step_parts(run, PROFILED, median)


def _speed(model: DecoderLM, read: Prefill, batch: int, turns: dict[str, list[tuple[float, StepParts]]]) -> Speed:
    best = {form: min(taken, key=lambda turn: turn[0]) for form, taken in turns.items()}
    seconds, parts = min(best.values(), key=lambda turn: turn[0])
    return Speed(
        step_seconds=seconds,
        parts=parts,
        operator_seconds=best[OPERATORS][0] if len(best) > 1 else None,
        state_bytes=read.nbytes,
        peak_bytes=read.peak_nbytes,
        weight_bytes=weight_bytes(model),
        batch=batch,
        dtype=str(model.embedding.weight.dtype).removeprefix("torch."),
        attention=attention_cost(model, read.state, batch),
    )
