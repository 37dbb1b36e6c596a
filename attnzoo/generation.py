"""What continuing a text takes and gives: prompts, options and results of `LanguageModel`."""

import operator
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from attnzoo.errors import suggest
from attnzoo.kvcache import CACHES, CachePolicy
from attnzoo.kvcache.choice import CacheSpec, option_names, read_cache
from attnzoo.kvcache.options import RENAMED
from attnzoo.models import CacheUse, GenerationConfig, TokenLogprobs
from attnzoo.models.generation_config import FIELDS
from attnzoo.tokenizer.text_stream import TextStream

Prompt = str | Sequence[int]
"""A text, or its token ids."""
FinishReason = Literal["stop", "length"]
"""A token or a string that ends texts came, or max_new_tokens was reached."""


class GenerationOptions(TypedDict, total=False):
    """Keyword options of `generate`, `stream` and `chat`: the fields of `GenerationConfig`, and the options that most
    cache policies share. Any option of the policy in use is taken; in type-checked code give the others in a mapping,
    cache={"policy": "snapkv", "pool": 5}."""

    max_new_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: str | Sequence[str]
    logprobs: int | None
    n: int
    ignore_eos: bool
    keep_ratio: float
    min_tokens: int
    sinks: int
    prefill: Literal["oneshot", "stream"]
    channel_ratio: float
    value_channel_ratio: float
    window: int


@dataclass(frozen=True)
class Continuation:
    """One continuation of a prompt.

    text: without the prompt, and without the stop string or token that ended it. token_ids: all new tokens, the one
    that ended it included. logprobs: of every token in token_ids, natural logarithms; None where they were not asked
    for. finish_reason: "stop" or "length". cache: what the cache did.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason
    cache: CacheUse

    @property
    def cumulative_logprob(self) -> float | None:
        """Sum of the tokens' log probabilities in nats; None where they were not asked for."""
        return None if self.logprobs is None else sum(each.logprob for each in self.logprobs)


@dataclass(frozen=True)
class Generation:
    """A prompt and its continuations.

    prompt: its text, None where token ids were given. prompt_token_ids: what the model read. outputs: `n`
    continuations. `text`, `token_ids`, `logprobs`, `finish_reason` and `cache` are those of the first one.
    """

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[Continuation, ...]

    @property
    def prompt_tokens(self) -> int:
        """How many tokens the model read."""
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
    """Pieces of a text as they become final: whole characters, and nothing that could belong to a stop string. They add
    up to the text of `result`, which is there once the last piece has been read."""

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

    @property
    def result(self) -> Generation:
        """The whole text, and how it came about. Raises ValueError before the last piece has been read."""
        if self._result is None:
            raise ValueError("the stream has not ended: read its pieces to the end before its result")
        return self._result


@dataclass(frozen=True)
class TextLogprobs:
    """How likely a model finds a text.

    token_ids: what it read, the begin token first where the model's texts have one. logprobs: natural logarithm of each
    token's probability given those before it; None for the first. total: their sum in nats.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]

    @property
    def total(self) -> float:
        return sum(value for value in self.logprobs if value is not None)


@dataclass(frozen=True)
class StepCost:
    """One pass through the model for all sequences.

    flops: multiply and add counted apart. bytes_moved: a lower bound of what passes between memory and processor:
    weights, activations, the state once. kv_bytes: of the state after it.
    """

    flops: int
    bytes_moved: int
    kv_bytes: int


@dataclass(frozen=True)
class GenerationCost:
    """What a prompt and the first new token behind it cost. policy: the name of the cache policy, which decides bytes;
    flops are those of the full cache, an upper bound for one that keeps less."""

    prompt: StepCost
    decode: StepCost
    policy: str


class Writer:
    """A continuation that is being written, `limit` tokens at most."""

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
        """What was written, once it has ended."""
        assert self._reason is not None
        logprobs = tuple(self._logprobs) if with_logprobs else None
        return Continuation("".join(self._pieces), tuple(self._tokens), logprobs, self._reason, cache)


def as_batch(prompts: Any) -> tuple[list[Prompt], bool]:
    """(the prompts, whether it was one alone). Raises ValueError for what is neither text nor token ids."""
    prompts = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    if isinstance(prompts, str):
        return [prompts], True
    if isinstance(prompts, Mapping | bytes | bytearray) or not isinstance(prompts, Sequence):
        raise ValueError(f"prompts has type {type(prompts).__name__}; give text, token ids, or a list of either")
    if not prompts:
        raise ValueError("prompts is empty; give a text, token ids, or a list of either")
    if all(is_token(item) for item in prompts):
        return [list(map(operator.index, prompts))], True
    batch: list[Prompt] = []
    for index, item in enumerate(prompts):
        item = item.tolist() if hasattr(item, "tolist") else item
        if isinstance(item, str):
            batch.append(item)
        elif (
            isinstance(item, Sequence)
            and not isinstance(item, bytes | bytearray)
            and all(is_token(token) for token in item)
        ):
            batch.append(list(map(operator.index, item)))
        else:
            raise ValueError(f"prompts[{index}]={item!r} has type {type(item).__name__}; give text or token ids")
    return batch, False


def is_token(value: Any) -> bool:
    """Whether it is a whole number, of numpy for example."""
    return not isinstance(value, bool) and hasattr(value, "__index__")


def check_messages(messages: Any) -> None:
    """Raises ValueError for what is no conversation. What a role may be, and whether there must be content, is for the
    template to say."""
    example = 'a list such as [{"role": "user", "content": "Hello"}]'
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        found = "is empty" if isinstance(messages, Sequence) and not messages else f"has type {type(messages).__name__}"
        raise ValueError(f"messages {found}; it must be {example}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"messages[{index}] has type {type(message).__name__}; messages must be {example}")
        if not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{index}].role={message.get('role')!r} must be a text such as 'user'")


ELSEWHERE = {
    "max_tokens": "say max_new_tokens for the length of a text, and cache={'policy': ..., 'max_tokens': ...} for the "
    "tokens that a cache keeps",
    "max_length": "say max_new_tokens, which does not count the prompt",
    "do_sample": "set temperature instead: 0 takes the most likely token",
    "num_return_sequences": "say n",
    "stop_strings": "say stop",
    "return_dict_in_generate": "results always say everything",
    "num_beams": "there is no beam search",
    "min_p": "it is not supported; top_p and top_k are",
    "repetition_penalty": "it is not supported",
    "sampling_params": "say generation_config",
}
"""What users of transformers and vLLM may say, and what it is here."""


def read_options(
    base: GenerationConfig | None, cache: CacheSpec | None, options: Mapping[str, Any]
) -> tuple[GenerationConfig, CachePolicy | None]:
    """(how to generate, the cache policy; None where none was named) from keyword options of both.

    `base` holds for what `options` leave out. Raises ValueError that names the option for what nobody knows, for
    options of a cache that is not named, and as `GenerationConfig` and `read_cache`.
    """
    if base is not None and not isinstance(base, GenerationConfig):
        raise ValueError(
            f"generation_config has type {type(base).__name__}; give attnzoo.GenerationConfig(...), or its fields as "
            "keywords"
        )
    mine = {name: value for name, value in options.items() if name in FIELDS}
    others = {name: value for name, value in options.items() if name not in FIELDS}
    known = _cache_options(cache)
    for name in others:
        if name in ELSEWHERE:
            raise ValueError(f"unknown option {name!r}: {ELSEWHERE[name]}")
        owners = [policy for policy in CACHES if name in option_names(policy)]
        if cache is None and owners:
            raise ValueError(f"{name}={others[name]!r} is an option of cache policies: name one, cache={owners[0]!r}")
        if known is not None and name not in known:
            raise ValueError(f"unknown option {name!r}{suggest(name, {*FIELDS, *known} - {*RENAMED, *ELSEWHERE})}")
    config = GenerationConfig(**_fields(base) | mine)
    return config, None if cache is None else read_cache(cache, others)


def _fields(base: GenerationConfig | None) -> dict[str, Any]:
    return {} if base is None else {name: getattr(base, name) for name in FIELDS}


def _cache_options(cache: Any) -> list[str] | None:
    """Options that keywords may give; None where the cache itself has to be refused, or refuses them."""
    if cache is None:
        return []
    policy = cache.get("policy") if isinstance(cache, Mapping) else cache
    if not isinstance(policy, str) or policy not in CACHES:
        return None
    known = option_names(policy)
    return known + [old for old, new in RENAMED.items() if new in known]
