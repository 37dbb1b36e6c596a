"""What `LanguageModel.generate` and its relatives return."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Literal

from attnzoo.attention.edits import Reading
from attnzoo.models import CacheUse, TokenLogprobs
from attnzoo.tokenizer.text_stream import TextStream

FinishReason = Literal["stop", "length"]
"""stop: a stop token or stop string was generated. length: max_new_tokens was reached."""


@dataclass(frozen=True)
class Continuation:
    """One continuation of a prompt.

    text: the new text, without the stop string or token that ended it. token_ids: all new tokens, with the last one.
    logprobs: natural logarithms for every token in token_ids; None if they were not requested. cache: what the cache
    kept and what it took.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason
    cache: CacheUse

    @property
    def cumulative_logprob(self) -> float | None:
        """Sum of the tokens' log probabilities in nats; None if they were not requested."""
        return None if self.logprobs is None else sum(each.logprob for each in self.logprobs)


@dataclass(frozen=True)
class Generation:
    """A prompt and its continuations.

    prompt: its text, None if token ids were given. prompt_token_ids: the tokens that the model read, -1 for each
    embedding. outputs: `n`
    continuations. reading: what was read of attention, by layer; None where nothing was asked for. `text`, `token_ids`,
    `logprobs`, `finish_reason` and `cache` are those of the first continuation.
    """

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[Continuation, ...]
    reading: Reading | None = None

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens in the prompt."""
        return len(self.prompt_token_ids)

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.outputs[0].token_ids

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...] | None:
        return self.outputs[0].logprobs

    @property
    def finish_reason(self) -> FinishReason:
        return self.outputs[0].finish_reason

    @property
    def cache(self) -> CacheUse:
        return self.outputs[0].cache


class GenerationStream(Iterator[str]):
    """An iterator over the pieces of a text as they become final. A piece has whole characters and nothing that could
    belong to a stop string. The pieces add up to the text of `result`."""

    def __init__(self, pieces: Generator[str, None, list[Generation]]) -> None:
        self._pieces = pieces
        self._result: Generation | None = None

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            if end.value is not None:
                (self._result,) = end.value
            raise StopIteration from None

    def close(self) -> None:
        """Ends the stream early and frees what it holds; there is no result then."""
        self._pieces.close()

    @property
    def result(self) -> Generation:
        """The result, as `generate` returns it. Raises ValueError before the last piece has been read."""
        if self._result is None:
            raise ValueError("the stream has not ended, or was closed: read its pieces to the end before its result")
        return self._result


@dataclass(frozen=True)
class TextLogprobs:
    """The log probabilities of a text under a model.

    token_ids: the text's tokens, with the begin token if the model uses one. logprobs: natural logarithm of each
    token's probability given the tokens before it; None for the first token. total: their sum in nats.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]

    @property
    def total(self) -> float:
        return sum(value for value in self.logprobs if value is not None)


class Writer:
    """Collects the tokens and the text of one continuation, `limit` tokens at most."""

    def __init__(self, stream: TextStream, limit: int, stop_ids: frozenset[int]) -> None:
        self._stream, self._limit, self._stop_ids = stream, limit, stop_ids
        self._pieces: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._reason: FinishReason | None = None

    def push(self, token: int, logprobs: TokenLogprobs | None) -> str:
        """Adds a token; returns the text that has become final."""
        self._tokens.append(token)
        if logprobs is not None:
            entry = TokenLogprobs(logprobs.token, logprobs.logprob, logprobs.top, self._stream.offset)
            self._logprobs.append(entry)
        ends, last = token in self._stop_ids, len(self._tokens) >= self._limit
        text, self._reason = self._stream.advance(token, ends=ends, last=last)
        self._pieces.append(text)
        return text

    @property
    def ended(self) -> bool:
        return self._reason is not None

    def continuation(self, cache: CacheUse, with_logprobs: bool) -> Continuation:
        """The finished continuation; call it only after `ended` is True."""
        assert self._reason is not None
        logprobs = tuple(self._logprobs) if with_logprobs else None
        return Continuation("".join(self._pieces), tuple(self._tokens), logprobs, self._reason, cache)
