"""Prompts, options and results of `LanguageModel.generate` and its relatives."""

import bisect
import itertools
import operator
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict

from attnzoo.attention.edits import EditPlan, Edits, Item, Reading, TokenLayout
from attnzoo.errors import suggest
from attnzoo.kvcache import CACHES, CachePolicy
from attnzoo.kvcache.choice import CacheSpec, option_names, read_cache
from attnzoo.kvcache.options import RENAMED
from attnzoo.models import CacheUse, DecoderLM, GenerationConfig, TokenLogprobs
from attnzoo.models.generation_config import FIELDS
from attnzoo.tokenizer import Tokenizer
from attnzoo.tokenizer.text_stream import TextStream

Prompt = str | Sequence[int]
"""A text, or its token ids."""
FinishReason = Literal["stop", "length"]
"""stop: a stop token or stop string was generated. length: max_new_tokens was reached."""


Spans = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None
"""Names of parts of a prompt, or of each prompt: [start, stop) in tokens, several of these, or a text in the prompt."""


class GenerationOptions(TypedDict, total=False):
    """Keyword options of `generate`, `stream` and `chat`: the fields of `GenerationConfig`, those of `AttentionWish`,
    and options that most cache policies share. Other options of a policy work as keywords too; type-checked code passes
    them in a mapping: cache={"policy": "snapkv", "pool": 5}."""

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
    edits: Edits | Sequence[Item]
    read: Edits | Sequence[Item]
    spans: Spans


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

    prompt: its text, None if token ids were given. prompt_token_ids: the tokens that the model read. outputs: `n`
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


@dataclass(frozen=True)
class StepCost:
    """The cost of one forward pass for all sequences.

    flops: floating point operations; a multiply-add counts as two. bytes_moved: lower bound of the memory traffic:
    weights, activations, and the state once. kv_bytes: size of the state after the pass.
    """

    flops: int
    bytes_moved: int
    kv_bytes: int


@dataclass(frozen=True)
class GenerationCost:
    """The cost of a prompt and of one decode step after it. policy: name of the cache policy. Bytes are those of the
    policy; flops are those of the full cache, an upper bound for a policy that keeps fewer tokens."""

    prompt: StepCost
    decode: StepCost
    policy: str


@dataclass(frozen=True)
class AttentionWish:
    """What is to be read and edited of attention while a text is generated. edits, read: in list order, edits first.
    spans: what the names in them mean, for each prompt: [start, stop) in tokens, several of these, or a text that
    stands in the prompt, with all of its tokens wherever it stands."""

    edits: Edits | Sequence[Item] = ()
    read: Edits | Sequence[Item] = ()
    spans: Spans = None

    @classmethod
    def taken_from(cls, options: Mapping[str, Any]) -> "tuple[AttentionWish, dict[str, Any]]":
        """(the wish in keyword options, the other options)."""
        mine = {each.name for each in fields(cls)}
        rest = {name: value for name, value in options.items() if name not in mine}
        return cls(**{name: value for name, value in options.items() if name in mine}), rest

    def plans(
        self, model: DecoderLM, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], limits: Sequence[int]
    ) -> list[EditPlan] | None:
        """A plan for every prompt, None where nothing is wished. Raises ValueError as `DecoderLM.plan_edits`."""
        edits = _items(self.edits, "edits")
        items = [*edits, *_items(self.read, "read")]
        if not items:
            return None
        spans = [self.spans] * len(prompts) if self.spans is None or isinstance(self.spans, Mapping) else self.spans
        if len(spans) != len(prompts):
            raise ValueError(
                f"spans has {len(spans)} entries for {len(prompts)} prompts; give one each, or one for all"
            )
        plans = []
        for ids, named, limit in zip(prompts, spans, limits, strict=True):
            found = {name: token_spans(tokenizer, ids, value, name) for name, value in (named or {}).items()}
            layout, new = TokenLayout(len(ids), found), max(limit - 1, 0)
            try:
                plans.append(model.plan_edits(Edits(*items), layout, new))
            except ValueError as error:
                raise ValueError(_of_lists(str(error), len(edits))) from None
        return plans


def _of_lists(message: str, edits: int) -> str:
    """A message about the joined list with numbers of the two lists: of 2 edits, edits[2] is read[0]."""
    pattern = r"\bedits\[(\d+)\]"
    return re.sub(pattern, lambda at: at[0] if int(at[1]) < edits else f"read[{int(at[1]) - edits}]", message)


def _items(given: Any, name: str) -> Sequence[Any]:
    if isinstance(given, Edits):
        return given.items
    if isinstance(given, Item):
        return [given]
    if isinstance(given, str | Mapping) or not isinstance(given, Sequence):
        raise ValueError(f"{name}={given!r}: give Edits(...), or a list of reads and edits")
    return given


def token_spans(tokenizer: Tokenizer, ids: Sequence[int], value: Any, name: str) -> Any:
    """[start, stop) of all places where a text stands among the tokens; anything but a text as it is. Raises ValueError
    where it does not stand there."""
    if not isinstance(value, str):
        if not isinstance(value, Sequence) or not value:
            raise ValueError(
                f"spans[{name!r}]={value!r}: give a text of the prompt, [start, stop) in tokens, or several"
            )
        return value
    ends = list(itertools.accumulate(len(tokenizer.token_bytes(token)) for token in ids))
    whole, wanted, found = b"".join(map(tokenizer.token_bytes, ids)), value.encode(), []
    at = whole.find(wanted) if wanted else -1
    while at >= 0:
        first = bisect.bisect_right(ends, at)
        found.append((first, bisect.bisect_left(ends, at + len(wanted)) + 1))
        at = whole.find(wanted, at + len(wanted))
    if not found:
        raise ValueError(
            f"spans[{name!r}]={value!r} does not stand in the prompt; give its words as the prompt has them"
        )
    return found


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


def as_batch(prompts: Any) -> tuple[list[Prompt], bool]:
    """(list of prompts, whether a single prompt was given). Raises ValueError for anything but text and token ids."""
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
    """Whether the value is an integer, including numpy's integers; a bool is not."""
    return not isinstance(value, bool) and hasattr(value, "__index__")


def check_messages(messages: Any) -> None:
    """Raises ValueError unless `messages` is a list of mappings with a role. The chat template checks which roles exist
    and whether content is required."""
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
    "max_tokens": "use max_new_tokens for the length of a text, and cache={'policy': ..., 'max_tokens': ...} for the "
    "tokens that a cache keeps",
    "max_length": "use max_new_tokens, which does not count the prompt",
    "do_sample": "set temperature instead: 0 takes the most likely token",
    "num_return_sequences": "use n",
    "stop_strings": "use stop",
    "return_dict_in_generate": "leave it out: results always hold token ids, log probabilities and cache use",
    "num_beams": "there is no beam search",
    "min_p": "it is not supported; top_p and top_k are",
    "repetition_penalty": "it is not supported",
    "sampling_params": "use generation_config",
}
"""Option names of transformers and vLLM, and the advice that the error message gives."""


def read_options(
    base: GenerationConfig | None, cache: CacheSpec | None, options: Mapping[str, Any]
) -> tuple[GenerationConfig, CachePolicy | None]:
    """Splits keyword options into (generation config, cache policy); the policy is None if `cache` is.

    base: supplies the fields that `options` leave out. Raises ValueError that names the option if it is unknown, or
    belongs to a cache policy while `cache` is None; and the errors of `GenerationConfig` and `read_cache`.
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
            raise ValueError(f"{name}={others[name]!r} is an option of cache policies; name one, cache={owners[0]!r}")
        if known is not None and name not in known:
            raise ValueError(f"unknown option {name!r}{suggest(name, {*FIELDS, *known} - {*RENAMED, *ELSEWHERE})}")
    config = GenerationConfig(**_fields(base) | mine)
    return config, None if cache is None else read_cache(cache, others)


def _fields(base: GenerationConfig | None) -> dict[str, Any]:
    return {} if base is None else {name: getattr(base, name) for name in FIELDS}


def _cache_options(cache: Any) -> list[str] | None:
    """Names of the cache's options; None if `cache` names no known policy, which `read_cache` reports."""
    if cache is None:
        return []
    policy = cache.get("policy") if isinstance(cache, Mapping) else cache
    if not isinstance(policy, str) or policy not in CACHES:
        return None
    known = option_names(policy)
    return known + [old for old, new in RENAMED.items() if new in known]
