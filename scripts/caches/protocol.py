"""Measures compressed caches: reads a prompt, compresses its cache, and then forces the following tokens.

A single forward pass over a text never reads a compressed state, so that its perplexity does not measure compression.
Here the prompt is read in chunks, its complete state is compressed, and all following tokens use the compressed state:
a later question in one chunk, and answers token by token, as in a server.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.kvcache import CachePolicy
from attnzoo.models import DecoderLM
from attnzoo.tasks.examples import Example
from scripts.caches.metrics import FidelityMeter

CHUNK = 128
"""Tokens of a prompt chunk; policies with prefill="stream" compress after each chunk."""

CONDITIONS = ("inside", "outside", "second")
"""Where the question is. inside: at the end of the prompt, where policies observe queries; outside: after compression;
second: after compression, while the prompt ended with another question."""


@dataclass
class Prefill:
    """A compressed state. nbytes: allocated bytes of all rows; peak_nbytes: largest state during prefill."""

    state: Any
    nbytes: int
    peak_nbytes: int


@dataclass(frozen=True)
class Begun:
    """The uncompressed state after the complete chunks of a prompt's beginning. tokens: read so far."""

    state: Any
    tokens: int
    peak_nbytes: int


@dataclass(frozen=True)
class Answer:
    """An answer under one of `CONDITIONS`. right: whether every answer token was the most likely one."""

    condition: str
    right: bool


@torch.no_grad()
def begin(model: DecoderLM, tokens_BT: Tensor, policy: CachePolicy, *, chunk: int, capacity: int) -> Begun:
    """Reads the complete chunks of the common beginning of several prompts. capacity: length of the longest prompt."""
    state = model.init_state(tokens_BT.shape[0], capacity, cache=policy)
    return _read(model, tokens_BT[:, : tokens_BT.shape[1] // chunk * chunk], Begun(state, 0, 0), chunk)


@torch.no_grad()
def prefill(
    model: DecoderLM,
    tokens_BT: Tensor,
    policy: CachePolicy,
    *,
    chunk: int = CHUNK,
    room: int = 0,
    begun: Begun | None = None,
) -> Prefill:
    """Reads a prompt in chunks and compresses its state. room: tokens that will follow in the same buffers. begun: the
    prompt's beginning, read in the same chunks; it is not changed.

    The peak is the largest state after a chunk or after compression; memory inside a call is not counted.
    """
    if begun is None:
        begun = Begun(model.init_state(tokens_BT.shape[0], tokens_BT.shape[1] + room, cache=policy), 0, 0)
    else:
        begun = Begun(begun.state.map(lambda _, tensor: tensor.clone()), begun.tokens, begun.peak_nbytes)
    done = _read(model, tokens_BT, begun, chunk)
    state = model.compress(done.state)
    return Prefill(state, state.nbytes(), max(done.peak_nbytes, state.nbytes()))


def _read(model: DecoderLM, tokens_BT: Tensor, begun: Begun, chunk: int) -> Begun:
    """Reads the tokens after `begun` in chunks. It consumes the state of `begun`."""
    state, peak = begun.state, begun.peak_nbytes
    for start in range(begun.tokens, tokens_BT.shape[1], chunk):
        _, state = model.extend_hidden(tokens_BT[:, start : start + chunk], state)
        peak = max(peak, state.nbytes())
    return Begun(state, tokens_BT.shape[1], peak)


@torch.no_grad()
def force(model: DecoderLM, state: Any, tokens_BT: Tensor, *, together: int = 0) -> tuple[Tensor, Any, float]:
    """(logits_BTV, state, seconds): reads the first `together` tokens in one chunk and the others one by one. Logits t
    predict the token after t. seconds: of the single tokens."""
    logits = []
    if together:
        logits_BTV, state = model.extend(tokens_BT[:, :together], state)
        logits.append(logits_BTV)
    begin = time.perf_counter()
    for step in range(together, tokens_BT.shape[1]):
        logits_B1V, state = model.extend(tokens_BT[:, step : step + 1], state)
        logits.append(logits_B1V)
    return torch.cat(logits, dim=1), state, time.perf_counter() - begin


@dataclass(frozen=True)
class Told:
    """Answers to a batch of examples, the bytes of its first sequence run alone, and decoded tokens and seconds.

    Bytes are measured alone because every layer of a batch has as many slots as its largest sequence needs. The answers
    of a batch equal those of single runs.
    """

    answers: list[Answer]
    nbytes: int
    peak_nbytes: int
    tokens: int
    seconds: float


def ask(model: DecoderLM, examples: list[Example], policy: CachePolicy, *, chunk: int = CHUNK) -> Told:
    """Answers under all conditions, for examples whose contexts and first two questions have equal lengths.

    The first question is asked inside and outside the prompt, the second question after the first has been answered.
    """
    device = model.embedding.weight.device
    body_BT = torch.tensor([example.body for example in examples], device=device)
    first, second = ([example.questions[n] for example in examples] for n in (0, 1))

    def column(questions: list[Any], *parts: str) -> Tensor:
        return torch.tensor([sum((getattr(q, part) for part in parts), ()) for q in questions], device=device)

    answers = []
    # Inside: the prompt ends with the first question; decoding begins with its lead.
    prompt_BT = torch.cat([body_BT, column(first, "prompt")], dim=1)
    begun = begin(model, body_BT, policy, chunk=chunk, capacity=prompt_BT.shape[1])
    inside = prefill(model, prompt_BT, policy, chunk=chunk, begun=begun)
    told = force(model, inside.state, column(first, "lead", "answer"), together=len(first[0].lead))
    logits_BTV, state, seconds = told
    answers += [Answer("inside", right) for right in _right(logits_BTV, column(first, "answer"))]
    whole, asked = column(second, "prompt", "lead", "answer"), len(second[0].tokens) - len(second[0].answer)
    logits_BTV, _, more = force(model, state, whole, together=asked)
    answers += [Answer("second", right) for right in _right(logits_BTV, column(second, "answer"))]
    outside = prefill(model, body_BT, policy, chunk=chunk, begun=begun)
    whole, asked = column(first, "prompt", "lead", "answer"), len(first[0].tokens) - len(first[0].answer)
    logits_BTV, _, rest = force(model, outside.state, whole, together=asked)
    answers += [Answer("outside", right) for right in _right(logits_BTV, column(first, "answer"))]
    forced = len(examples) * (2 * len(first[0].answer) + len(second[0].answer))
    alone = prefill(model, prompt_BT[:1], policy, chunk=chunk)
    return Told(answers, alone.nbytes, alone.peak_nbytes, forced, seconds + more + rest)


def _right(logits_BTV: Tensor, answers_BT: Tensor) -> list[bool]:
    """Whether all answer tokens, the last of the forced ones, were predicted as most likely, by row."""
    length = answers_BT.shape[1]
    guesses_BT = logits_BTV[:, -length - 1 : -1].argmax(-1)
    right: list[bool] = (guesses_BT == answers_BT).all(dim=1).tolist()
    return right


def fidelity(
    model: DecoderLM, tokens_BT: Tensor, prompt: int, policy: CachePolicy, full_BTV: Tensor, meter: FidelityMeter
) -> Prefill:
    """Adds to `meter` the policy's logits after `prompt` tokens and the full cache's `full_BTV` (of `forced_logits`).
    The prediction at the prompt's last token, before compression, does not count."""
    done = prefill(model, tokens_BT[:, :prompt], policy)
    logits_BTV, _, _ = force(model, done.state, tokens_BT[:, prompt:-1])
    meter.add(full_BTV, logits_BTV, tokens_BT[:, prompt + 1 :])
    return done


def forced_logits(model: DecoderLM, tokens_BT: Tensor, prompt: int, policy: CachePolicy) -> Tensor:
    """logits_BTV after each token from position `prompt` on, without the last token, which has no next token."""
    done = prefill(model, tokens_BT[:, :prompt], policy)
    return force(model, done.state, tokens_BT[:, prompt:-1])[0]
