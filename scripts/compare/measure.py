"""Measures speed and memory of a model, in one process after the training runs; they do not depend on the weights."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from attnzoo.attention.segment_memory import remember
from attnzoo.models import DecoderConfig, DecoderLM, build_shapes
from attnzoo.profiling.memory import peak_bytes
from scripts.compare.segments import Form, segment_forward

MIB = 2**20


@dataclass(frozen=True)
class Speed:
    """train_ms: median time of a training step. peak_bytes: peak memory of a step, gradients included, without weights
    and optimizer state. decode_us: median time of decoding a token of one sequence. state_bytes_per_token: bytes that a
    token adds to the state. state_bytes: allocated bytes of the state; state_bytes_said: its bytes by `cost`.
    """

    train_ms: float
    peak_bytes: int
    decode_us: float
    state_bytes_per_token: int
    state_bytes: int
    state_bytes_said: int


def measure(config: DecoderConfig, batch: int, length: int, repeats: int = 5) -> Speed:
    """Measures training on random tokens [batch, length], and decoding with a context of `length` tokens."""
    torch.manual_seed(0)
    model = DecoderLM(config)
    tokens_BT = torch.randint(config.vocab_size, (batch, length + 1))
    step = _stepper(model, lambda: model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:]))
    step()
    peak = peak_bytes(step)
    train_ms = 1e3 * statistics.median(_seconds(step) for _ in range(repeats))
    said = model.cost(1, 1, length).state_bytes
    return Speed(
        train_ms,
        peak,
        1e6 * _decode_seconds(model, length),
        said - model.cost(1, 1, length - 1).state_bytes,
        model.init_state(1, length).nbytes(),
        said,
    )


def measure_segments(config: DecoderConfig, batch: int, segment: int, keep: int, form: Form) -> tuple[float, int]:
    """(median milliseconds, peak bytes) of a training step in the paper's setting, with a full memory."""
    torch.manual_seed(0)
    model = DecoderLM(config)
    tokens_BT = torch.randint(config.vocab_size, (batch, segment + 1))
    memory = tuple(
        remember(part, torch.randn(batch, keep, config.model_dim)) for part in model.init_memory(batch, keep)
    )

    def loss() -> torch.Tensor:
        logits_BTV, _ = segment_forward(model, tokens_BT[:, :-1], memory, form)
        return F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())

    step = _stepper(model, loss)
    step()
    return 1e3 * statistics.median(_seconds(step) for _ in range(5)), peak_bytes(step)


def standing_bytes(config: DecoderConfig) -> int:
    """Bytes of the weights and of Adam's two moments."""
    return 3 * sum(parameter.nbytes for parameter in build_shapes(config).parameters())


def _stepper(model: DecoderLM, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


@torch.no_grad()
def _decode_seconds(model: DecoderLM, context: int, steps: int = 32) -> float:
    """Median seconds of decoding each of the last `steps` tokens up to `context`."""
    steps = min(steps, context - 1)
    tokens_1T = torch.randint(model.config.vocab_size, (1, context))
    state = model.init_state(1, context)
    _, state = model.extend_hidden(tokens_1T[:, : context - steps], state)
    seconds = []
    for place in range(context - steps, context):
        start = time.perf_counter()
        _, state = model.extend(tokens_1T[:, place : place + 1], state)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def segment_fault(config: DecoderConfig, segment: int, form: Form, tokens: int = 12) -> float:
    """The largest difference between logits by segments (with an unlimited memory) and by the parallel form.

    It is computed in float64, with weights large enough to show a wrong convolution.
    """
    torch.manual_seed(0)
    model = DecoderLM(config).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens_BT = torch.randint(config.vocab_size, (2, tokens))
    memory = model.init_memory(2, tokens)
    pieces = []
    with torch.no_grad():
        for piece_BT in tokens_BT.split(segment, dim=1):
            logits_BTV, memory = segment_forward(model, piece_BT, memory, form)
            pieces.append(logits_BTV)
        return float((torch.cat(pieces, dim=1) - model(tokens_BT)).abs().max())
