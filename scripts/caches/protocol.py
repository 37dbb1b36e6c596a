"""Prefill, compress, then force tokens one by one: the only order in which compression is really measured.

One pass over a text never reads a compressed state, so a perplexity from it says nothing. Here the prompt is read in
chunks, its state compressed once it is whole, and all that follows is read from what was kept: a later question in one
chunk and every answer a token at a time, as a server would.
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
"""Tokens of a prompt that are read at once; a policy that compresses as it goes does so after each."""

CONDITIONS = ("inside", "outside", "second")
"""Where a question stands. inside: at the end of the prompt, where policies look for what queries want; outside: it
comes after compression; second: it comes after compression, and the prompt ended with another one."""


@dataclass
class Prefill:
    """A compressed state, the bytes it takes (of all rows, as allocated), and the most that were held on the way."""

    state: Any
    nbytes: int
    peak_nbytes: int


@dataclass(frozen=True)
class Begun:
    """Uncompressed state of the whole chunks at the beginning of a prompt, their tokens, and the peak so far."""

    state: Any
    tokens: int
    peak_nbytes: int


@dataclass(frozen=True)
class Answer:
    """How a question was answered: under which condition, and whether every token of the answer was the likeliest."""

    condition: str
    right: bool


@torch.no_grad()
def begin(model: DecoderLM, tokens_BT: Tensor, policy: CachePolicy, *, chunk: int, capacity: int) -> Begun:
    """Reads the whole chunks of what several prompts begin with; they may get `capacity` tokens long."""
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
    """Reads a prompt in chunks and compresses its state; `room`: tokens that are to follow in the same buffers.
    `begun`: a beginning of it that was read in the same chunks; it may be used again.

    The peak is the largest state that existed after a chunk or after compression. State that lives only inside a call
    is not seen by it.
    """
    if begun is None:
        begun = Begun(model.init_state(tokens_BT.shape[0], tokens_BT.shape[1] + room, cache=policy), 0, 0)
    else:
        begun = Begun(begun.state.map(lambda _, tensor: tensor.clone()), begun.tokens, begun.peak_nbytes)
    done = _read(model, tokens_BT, begun, chunk)
    state = model.compress(done.state)
    return Prefill(state, state.nbytes(), max(done.peak_nbytes, state.nbytes()))


def _read(model: DecoderLM, tokens_BT: Tensor, begun: Begun, chunk: int) -> Begun:
    """What follows the beginning, chunk by chunk. Uses up its state."""
    state, peak = begun.state, begun.peak_nbytes
    for start in range(begun.tokens, tokens_BT.shape[1], chunk):
        _, state = model.extend_hidden(tokens_BT[:, start : start + chunk], state)
        peak = max(peak, state.nbytes())
    return Begun(state, tokens_BT.shape[1], peak)


@torch.no_grad()
def force(model: DecoderLM, state: Any, tokens_BT: Tensor, *, together: int = 0) -> tuple[Tensor, Any, float]:
    """(logits_BTV, state, seconds): feeds the first `together` tokens in one chunk and the others one at a time; logits
    t are read after token t. Seconds are those of single tokens."""
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
    """Answers to a batch of examples, the bytes of its first sequence alone, and the rate of decoding.

    Alone, because a batch has as many slots a layer as the neediest of its sequences, whose layers may want different
    shares; the answers of a batch are those of single runs all the same.
    """

    answers: list[Answer]
    nbytes: int
    peak_nbytes: int
    tokens: int
    seconds: float


def ask(model: DecoderLM, examples: list[Example], policy: CachePolicy, *, chunk: int = CHUNK) -> Told:
    """Answers under all conditions to examples whose contexts and first two questions have the same lengths.

    The first question is asked inside and outside, the second one after the first was answered.
    """
    device = model.embedding.weight.device
    body_BT = torch.tensor([example.body for example in examples], device=device)
    first, second = ([example.questions[n] for example in examples] for n in (0, 1))

    def column(questions: list[Any], *parts: str) -> Tensor:
        return torch.tensor([sum((getattr(q, part) for part in parts), ()) for q in questions], device=device)

    answers = []
    # Inside: all of the first question belongs to the prompt; what is decoded begins with its lead.
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
    """The answer is the end of what was forced; every token of it must have been the likeliest before it."""
    length = answers_BT.shape[1]
    guesses_BT = logits_BTV[:, -length - 1 : -1].argmax(-1)
    right: list[bool] = (guesses_BT == answers_BT).all(dim=1).tolist()
    return right


def fidelity(
    model: DecoderLM, tokens_BT: Tensor, prompt: int, policy: CachePolicy, full_BTV: Tensor, meter: FidelityMeter
) -> Prefill:
    """Adds to `meter` how the policy's logits over the tokens after `prompt` differ from the full cache's (`full_BTV`,
    by `forced_logits`); the prediction made by the prompt itself, before compression, does not count."""
    done = prefill(model, tokens_BT[:, :prompt], policy)
    logits_BTV, _, _ = force(model, done.state, tokens_BT[:, prompt:-1])
    meter.add(full_BTV, logits_BTV, tokens_BT[:, prompt + 1 :])
    return done


def forced_logits(model: DecoderLM, tokens_BT: Tensor, prompt: int, policy: CachePolicy) -> Tensor:
    """Logits after each token from `prompt` on, the last one left out: it has nothing to predict."""
    done = prefill(model, tokens_BT[:, :prompt], policy)
    return force(model, done.state, tokens_BT[:, prompt:-1])[0]
