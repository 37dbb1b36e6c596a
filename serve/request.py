"""A request in the engine: its sampling parameters, its progress, and the results of each step."""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from attnzoo.attention.edits import EditRun
from attnzoo.kvcache.choice import CacheChoice
from attnzoo.models.logit_changes import LogitChanges
from attnzoo.models.sampling import Sampling, TokenLogprobs, check_known, check_type
from attnzoo.tokenizer.text_stream import TextStream
from serve.faults import EditsError, message
from serve.history import Drafts
from serve.prompt_scores import PromptScores

if TYPE_CHECKING:
    import torch

    from attnzoo.models.decoder_lm import DecoderState

FinishReason = Literal["stop", "length", "deadline", "abort", "error"]

MAX_STOP_STRINGS, MAX_STOP_LENGTH, MAX_STOP_TOKENS, MAX_LOGPROBS, MAX_BIASED = 8, 256, 64, 20, 300
MAX_TEMPERATURE = 100
MAX_PRIORITY, MAX_DEADLINE_S = 1000, 86_400


class ContextLengthError(ValueError):
    """Prompt and completion together exceed the model's context."""


class CacheMemoryError(ValueError):
    """The request's compressed cache exceeds the memory for such caches (`cache_mib`)."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams(Sampling):
    """How to choose tokens and when to stop: the fields of `Sampling`, and these.

    seed: the same seed gives the same text, alone or in a batch; None draws a random seed. stop: strings that end the
    text and are not part of it. stop_token_ids: tokens that do the same. ignore_eos: go on after the model's own tokens
    that end a text. min_tokens: before so many tokens nothing ends the text. logprobs: number of alternatives to report
    for each token; None: no log probabilities. prompt_logprobs: the same for the tokens of the prompt. counts_prompt:
    whether metrics count the prompt, which they do for one of a prompt's choices. Raises ValueError that names the
    field.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False
    counts_prompt: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_tokens", "min_tokens", "seed", "logprobs", "prompt_logprobs"):
            check_type(name, getattr(self, name), int, "a whole number", optional="_tokens" not in name)
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} must be between 0 and max_tokens={self.max_tokens}")
        if self.temperature > MAX_TEMPERATURE:
            raise ValueError(f"temperature={self.temperature} must be between 0 (greedy) and {MAX_TEMPERATURE}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must fit into 64 bits")
        for name in ("ignore_eos", "counts_prompt"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name}={value!r} has type {type(value).__name__}; it must be True or False")
        self._check_stop()
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and not 0 <= count <= MAX_LOGPROBS:
                raise ValueError(f"{name}={count} must be between 0 and {MAX_LOGPROBS}")
        if len(self.logit_bias) > MAX_BIASED:
            raise ValueError(f"logit_bias holds {len(self.logit_bias)} tokens; at most {MAX_BIASED} are possible")

    def check_tokens(self, vocab_size: int) -> None:
        """Raises TokenIdError for a token that a vocabulary of this size does not have."""
        check_known("logit_bias", self.logit_bias, vocab_size)
        check_known("stop_token_ids", self.stop_token_ids, vocab_size)

    def ends(self, stop_ids: Collection[int]) -> frozenset[int]:
        """Tokens that end the text. stop_ids: those that end the model's texts."""
        return frozenset(self.stop_token_ids) if self.ignore_eos else frozenset({*stop_ids, *self.stop_token_ids})

    def _check_stop(self) -> None:
        if isinstance(self.stop, str):
            raise ValueError(f"stop={self.stop!r} is one text: give a tuple of them, ({self.stop!r},)")
        if not isinstance(self.stop, tuple | list) or not all(isinstance(text, str) for text in self.stop):
            raise ValueError(f"stop={self.stop!r} must be texts in a tuple, such as ('END',)")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise ValueError(f"stop holds {len(self.stop)} strings; at most {MAX_STOP_STRINGS} are possible")
        if not all(0 < len(text) <= MAX_STOP_LENGTH for text in self.stop):
            raise ValueError(f"stop strings must be between 1 and {MAX_STOP_LENGTH} characters long")
        tokens = self.stop_token_ids
        whole = isinstance(tokens, tuple | list) and all(isinstance(t, int) and not isinstance(t, bool) for t in tokens)
        if not whole or any(token < 0 for token in tokens):
            raise ValueError(f"stop_token_ids={tokens!r} must be token ids in a tuple, such as (2,)")
        if len(tokens) > MAX_STOP_TOKENS:
            raise ValueError(f"stop_token_ids holds {len(tokens)} tokens; at most {MAX_STOP_TOKENS} are possible")


@dataclass(frozen=True, kw_only=True)
class Urgency:
    """priority: the lower, the earlier; a more urgent request may take the slot and the memory of a less urgent one,
    which goes on later. deadline_s: seconds from its arrival after which a request ends with what there is. Raises
    ValueError that names the field."""

    priority: int = 0
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.priority, bool) or not isinstance(self.priority, int):
            raise ValueError(f"priority={self.priority!r} must be a whole number; the lower, the earlier")
        if abs(self.priority) > MAX_PRIORITY:
            raise ValueError(f"priority={self.priority} must lie between -{MAX_PRIORITY} and {MAX_PRIORITY}")
        limit = self.deadline_s
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float)):
            raise ValueError(f"deadline_s={limit!r} must be a number of seconds")
        if limit is not None and not 0 < limit <= MAX_DEADLINE_S:
            raise ValueError(f"deadline_s={limit} must be greater than 0 and at most {MAX_DEADLINE_S}")


USUAL = Urgency()


@dataclass(frozen=True, eq=False)
class Alone:
    """The group of one request that reads or edits attention, and so runs by itself. run: what it reads and edits;
    tokens: most tokens of its prompt and text."""

    cache: CacheChoice
    run: EditRun
    tokens: int


@dataclass(slots=True)
class Delta:
    """The progress of one request in one step; the last delta of a request has a `finish_reason`.

    text: new characters that are final. tokens: number of tokens generated so far. prompt_logprobs: with the first
    token, those of the prompt, if they are wanted. prompt_tokens, ttft_s (seconds from
    arrival to the first token), policy and the fields of `attnzoo.models.cache_use.CacheUse`: only in the last delta,
    as cached_tokens, the tokens of the prompt that were copied from earlier ones, not_cached, why none can be, and how
    many tokens that were drafted were accepted and rejected.
    error: with finish_reason "error", the message for the request's owner; it may quote the prompt. param: the field of
    the request that is at fault, if one is. run: in the last delta of a request that reads or edits attention, what it
    has read.
    """

    request_id: str
    text: str
    tokens: int
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    ttft_s: float = 0.0
    policy: str = "full"
    kept_tokens: int = 0
    kv_bytes: int = 0
    kv_bytes_full: int = 0
    not_compressed: str | None = None
    cached_tokens: int = 0
    not_cached: str | None = None
    accepted_tokens: int = 0
    rejected_tokens: int = 0
    error: str | None = None
    param: str | None = None
    run: EditRun | None = None


@dataclass(slots=True)
class Request:
    """One sequence in the engine. prompt: token ids, or an `EmbeddedPrompt`. group: the requests that decode together
    with it, by their cache; or `Alone`. changes: of its logits. scores: of its prompt. ends: tokens that end it. Times
    are seconds of `time.perf_counter`.

    aside: its state while it is set aside, if that is kept. known: tokens that it had generated when it was set aside
    without its state; they are given to the model once more. room: tokens, prompt and text together, that memory is
    counted for. cached: tokens of its prompt that were copied when it was first read. drafts: of its next tokens."""

    request_id: str
    prompt: Sequence[int]
    params: SamplingParams
    text: TextStream
    cache: CacheChoice
    group: CacheChoice | Alone
    generator: "torch.Generator | None"
    changes: LogitChanges | None
    scores: PromptScores | None
    ends: frozenset[int]
    arrived: float
    urgency: Urgency = USUAL
    room: int = 0
    generated: list[int] = field(default_factory=list)
    known: list[int] = field(default_factory=list)
    aside: "DecoderState | None" = None
    cached: int = 0
    drafts: Drafts = field(default_factory=Drafts)
    started: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0

    @property
    def context(self) -> int:
        """Number of tokens in the state: all but the newest, which the model has not read yet."""
        return len(self.prompt) + max(len(self.generated) - 1, 0)

    @property
    def repeats(self) -> bool:
        """Whether its next token is known."""
        return len(self.generated) < len(self.known)

    @property
    def count(self) -> int:
        """Number of tokens that it has generated, with those that it is given once more."""
        return max(len(self.generated), len(self.known))

    def repeat(self) -> None:
        """Takes the next token if it is known."""
        if self.repeats:
            self.generated.append(self.known[len(self.generated)])

    @property
    def may_end(self) -> bool:
        """Whether its next token may end it."""
        return len(self.generated) >= self.params.min_tokens

    @property
    def is_late(self) -> bool:
        """Whether its deadline has passed."""
        limit = self.urgency.deadline_s
        return limit is not None and time.perf_counter() - self.arrived >= limit


def whole_reason(request: Request) -> str | None:
    """Why all of its prompt must be computed, also what was read before; None: it need not be."""
    if isinstance(request.group, Alone):
        return "a request that reads or edits attention computes all of it"
    return None if request.scores is None else "a request for log probabilities of its prompt computes all of it"


def failed(request: Request, failure: BaseException) -> Delta:
    """The last delta of a request that failed."""
    return Delta(
        request.request_id,
        "",
        request.count,
        finish_reason="error",
        prompt_tokens=len(request.prompt),
        error=message(failure),
        param="attention" if isinstance(failure, EditsError) else None,
    )


@dataclass(frozen=True)
class CompletionOutput:
    """A finished request, as `Engine.generate` returns it. last: its last delta, with what the cache did."""

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs]
    last: Delta

    @classmethod
    def of(cls, parts: list[Delta], tokens: list[int]) -> "CompletionOutput":
        """The completion from all deltas of a request and its token ids."""
        last = parts[-1]
        assert last.finish_reason is not None
        logprobs = [entry for delta in parts for entry in delta.logprobs]
        return cls("".join(delta.text for delta in parts), tokens, last.finish_reason, logprobs, last)

    @property
    def error(self) -> str | None:
        """Why the request failed; None if it did not."""
        return self.last.error
