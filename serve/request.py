"""What a client asks for, what the engine remembers of it, and what it hands back step by step."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from attnzoo.kvcache.choice import CacheChoice
from attnzoo.models.sampling import TokenLogprobs
from attnzoo.tokenizer.text_stream import TextStream
from serve.faults import message

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_STOP_STRINGS, MAX_STOP_LENGTH, MAX_LOGPROBS = 8, 256, 20


class ContextLengthError(ValueError):
    """Prompt and completion do not fit into the model's context."""


class CacheMemoryError(ValueError):
    """The request's compressed cache is larger than all the memory for such caches."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    temperature 0 is greedy, and so is one below 1e-5. top_k 0 is off. seed: the same seed gives the same text, alone or
    in a batch; None draws one. stop: strings that end the text and are not part of it. logprobs: how many alternatives
    to report; None: no log probabilities at all. counts_prompt: whether the metrics count the prompt: once for all
    choices of one. Raises ValueError naming the field.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    counts_prompt: bool = True

    def __post_init__(self) -> None:
        for name in ("max_tokens", "top_k", "seed", "logprobs"):
            value = getattr(self, name)
            if (value is not None or name in ("max_tokens", "top_k")) and (
                isinstance(value, bool) or not isinstance(value, int)
            ):
                raise ValueError(f"{name}={value!r} has type {type(value).__name__}; it must be a whole number")
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name}={value!r} has type {type(value).__name__}; it must be a number")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1")
        if not 0.0 <= self.temperature <= 100.0:
            raise ValueError(f"temperature={self.temperature} must be between 0 (greedy) and 100")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p} must be greater than 0 and at most 1")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be 0 (off) or at least 1")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must fit into 64 bits")
        for name in ("ignore_eos", "counts_prompt"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name}={value!r} has type {type(value).__name__}; it must be True or False")
        self._check_stop()
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise ValueError(f"logprobs={self.logprobs} must be between 0 and {MAX_LOGPROBS}")

    def _check_stop(self) -> None:
        if isinstance(self.stop, str):
            raise ValueError(f"stop={self.stop!r} is one text: give a tuple of them, ({self.stop!r},)")
        if not isinstance(self.stop, tuple | list) or not all(isinstance(text, str) for text in self.stop):
            raise ValueError(f"stop={self.stop!r} must be texts in a tuple, such as ('END',)")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise ValueError(f"stop holds {len(self.stop)} strings; at most {MAX_STOP_STRINGS} are possible")
        if not all(0 < len(text) <= MAX_STOP_LENGTH for text in self.stop):
            raise ValueError(f"stop strings must be between 1 and {MAX_STOP_LENGTH} characters long")


@dataclass(slots=True)
class Delta:
    """News of one request after one step; the last one has a `finish_reason`.

    error: why the request failed, for its owner, with finish_reason "error"; the text it may quote is the owner's own.
    text: characters that are final. tokens: all tokens of the request so far. ttft_s: from arrival to the first token.
    policy, and the rest as in `attnzoo.models.cache_use.CacheUse`: how its state was kept, when it is finished.
    """

    request_id: str
    text: str
    tokens: int
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    ttft_s: float = 0.0
    policy: str = "full"
    kept_tokens: int = 0
    kv_bytes: int = 0
    kv_bytes_full: int = 0
    not_compressed: str | None = None
    error: str | None = None


@dataclass(slots=True)
class Request:
    """One sequence in the engine. Times are seconds of `time.perf_counter`."""

    request_id: str
    prompt: list[int]
    params: SamplingParams
    text: TextStream
    cache: CacheChoice
    generator: "torch.Generator | None"
    arrived: float
    generated: list[int] = field(default_factory=list)
    started: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0

    @property
    def context(self) -> int:
        """Tokens in the state: all but the newest, which has not been through the model."""
        return len(self.prompt) + max(len(self.generated) - 1, 0)


def failed(request: Request, failure: BaseException) -> Delta:
    """The last news of a request that failed."""
    return Delta(
        request.request_id,
        "",
        len(request.generated),
        finish_reason="error",
        prompt_tokens=len(request.prompt),
        error=message(failure),
    )


@dataclass(frozen=True)
class CompletionOutput:
    """A finished request, for callers without a stream."""

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs]
    last: Delta

    @classmethod
    def of(cls, parts: list[Delta], tokens: list[int]) -> "CompletionOutput":
        """From all news of a request."""
        last = parts[-1]
        assert last.finish_reason is not None
        logprobs = [entry for delta in parts for entry in delta.logprobs]
        return cls("".join(delta.text for delta in parts), tokens, last.finish_reason, logprobs, last)

    @property
    def error(self) -> str | None:
        """None unless the request failed."""
        return self.last.error
