"""Decoding at a long context: how fast every policy is on this machine, and how fast the bytes it reads allow.

The state is a real one: one random prompt is read in chunks and compressed, and its rows are then repeated to the
batch, because reading the prompt once a sequence would take the time of the whole benchmark and change no speed.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from attnzoo.evaluate.cache.protocol import prefill
from attnzoo.evaluate.cache.roofline import attention_cost
from attnzoo.kvcache import Compression
from attnzoo.models import DecoderLM, can_pack, pack_weights
from attnzoo.ops.cost import OpCost


@dataclass(frozen=True, kw_only=True)
class SpeedSizes:
    """Tokens of the prompt, sequences, decode steps of a turn, turns, tokens of a prefill chunk."""

    context: int = 8192
    batch: int = 16
    steps: int = 8
    turns: int = 3
    chunk: int = 512


NOTHING = OpCost(bytes_read=0, bytes_written=0, flops=0)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """step_seconds: of a decode step of all sequences, the median of the best turn. state_bytes, peak_bytes: of one
    sequence, after compression and at most during prefill. weight_bytes: read once a step. dtype: of weights and state.
    attention: what attention and merging of a step must move and compute, all sequences."""

    step_seconds: float
    state_bytes: int
    peak_bytes: int
    weight_bytes: int
    batch: int
    dtype: str
    attention: OpCost = NOTHING

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.batch / self.step_seconds

    @property
    def read_bytes(self) -> int:
        """What a step must read: weights once, every state once."""
        return self.weight_bytes + self.batch * self.state_bytes

    @property
    def read_rate(self) -> float:
        """Bytes a second at which a step gets through what it must read."""
        return self.read_bytes / self.step_seconds

    def sequences_in(self, memory: int) -> int:
        """How many sequences a cache of `memory` bytes holds when the last one to come in needs its peak.

        One prompt is read at a time; the others are already compressed.
        """
        if memory < self.peak_bytes:
            return 0
        return 1 + (memory - self.peak_bytes) // self.state_bytes


def weight_bytes(model: DecoderLM) -> int:
    """Bytes of the weights that decoding reads: an untied embedding is read by the row."""
    read = {id(p): p.nbytes for p in model.parameters()}
    if not model.config.tie_embeddings:
        read.pop(id(model.embedding.weight))
    return sum(read.values())


@torch.no_grad()
def measure_speed(
    model: DecoderLM, policies: dict[str, Compression], sizes: SpeedSizes, say: Callable[[str], None]
) -> dict[str, Speed]:
    """Speeds by policy, which take turns; `say` gets a line at each. All states are held at the same time.

    Where the CPU can, weights are packed in place, as serving does.
    """
    if can_pack(model):
        pack_weights(model)
    generator = torch.Generator().manual_seed(0)
    prompt_1T = torch.randint(model.config.vocab_size, (1, sizes.context), generator=generator)
    states: dict[str, Any] = {}
    bytes_of: dict[str, tuple[int, int]] = {}
    costs: dict[str, OpCost] = {}
    for name, policy in policies.items():
        begin = time.perf_counter()
        room = sizes.turns * (sizes.steps + 1)
        done = prefill(model, prompt_1T, policy, chunk=sizes.chunk, room=room)
        bytes_of[name] = (done.nbytes, done.peak_nbytes)
        costs[name] = attention_cost(model, done.state, sizes.batch)
        states[name] = done.state.map(lambda _, tensor: tensor.repeat_interleave(sizes.batch, dim=0))
        say(f"{name}: prompt of {sizes.context} tokens read in {time.perf_counter() - begin:.1f} s")
    found: dict[str, list[float]] = {name: [] for name in policies}
    tokens_B1 = torch.randint(model.config.vocab_size, (sizes.batch, 1), generator=generator)
    for turn in range(sizes.turns):
        for name in policies:
            seconds = []
            for _ in range(sizes.steps + 1):
                begin = time.perf_counter()
                _, states[name] = model.extend(tokens_B1, states[name])
                seconds.append(time.perf_counter() - begin)
            # The first step may make room for the tokens to come.
            found[name].append(statistics.median(seconds[1:]))
            say(f"turn {turn + 1} of {sizes.turns}, {name}: {1000 * found[name][-1]:.1f} ms a step")
    weights = weight_bytes(model)
    return {
        name: Speed(
            step_seconds=min(found[name]),
            state_bytes=bytes_of[name][0],
            peak_bytes=bytes_of[name][1],
            weight_bytes=weights,
            batch=sizes.batch,
            dtype=str(model.embedding.weight.dtype).removeprefix("torch."),
            attention=costs[name],
        )
        for name in policies
    }
