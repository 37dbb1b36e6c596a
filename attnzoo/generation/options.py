"""Keyword options of `LanguageModel.generate` and its relatives."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict

from attnzoo.attention.edits import Edits, Item
from attnzoo.errors import suggest
from attnzoo.generation.attention_wish import Spans
from attnzoo.kvcache import CACHES, CachePolicy
from attnzoo.kvcache.choice import CacheSpec, option_names, read_cache
from attnzoo.kvcache.options import RENAMED
from attnzoo.models import GenerationConfig
from attnzoo.models.generation_config import FIELDS


class GenerationOptions(TypedDict, total=False):
    """Keyword options of `generate`, `stream` and `chat`: the fields of `GenerationConfig`, those of `AttentionWish`,
    and options that most cache policies share. Other options of a policy work as keywords too; type-checked code passes
    them in a mapping: cache={"policy": "snapkv", "pool": 5}."""

    max_new_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
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


ELSEWHERE = {
    "max_tokens": "use max_new_tokens for the length of a text, and cache={'policy': ..., 'max_tokens': ...} for the "
    "tokens that a cache keeps",
    "max_length": "use max_new_tokens, which does not count the prompt",
    "do_sample": "set temperature instead: 0 takes the most likely token",
    "num_return_sequences": "use n",
    "stop_strings": "use stop",
    "return_dict_in_generate": "leave it out: results always hold token ids, log probabilities and cache use",
    "num_beams": "there is no beam search",
    "sampling_params": "use generation_config",
}
"""Option names of transformers and vLLM, and the advice that the error message gives."""


def read_options(
    base: GenerationConfig | None, cache: CacheSpec | None, options: Mapping[str, Any], also: Iterable[str] = ()
) -> tuple[GenerationConfig, CachePolicy | None]:
    """Splits keyword options into (generation config, cache policy); the policy is None if `cache` is.

    base: supplies the fields that `options` leave out. also: options that the caller takes beside these, for messages.
    Raises the errors of `read_policy` and `GenerationConfig`, which name the option.
    """
    if base is not None and not isinstance(base, GenerationConfig):
        raise ValueError(
            f"generation_config has type {type(base).__name__}; give attnzoo.GenerationConfig(...), or its fields as "
            "keywords"
        )
    mine = {name: value for name, value in options.items() if name in FIELDS}
    others = {name: value for name, value in options.items() if name not in FIELDS}
    policy = read_policy(cache, others, {*FIELDS, *also})
    return GenerationConfig(**_fields(base) | mine), policy


def read_policy(cache: CacheSpec | None, options: Mapping[str, Any], also: Collection[str] = ()) -> CachePolicy | None:
    """The cache policy with its keyword options; None if `cache` is.

    also: options that the caller takes beside `cache` and those of the policy, for messages. Raises ValueError that
    names the option if it is unknown, or belongs to a cache policy while `cache` is None; and the errors of
    `read_cache`.
    """
    known = _cache_options(cache)
    for name in options:
        if name in ELSEWHERE:
            raise ValueError(f"unknown option {name!r}: {ELSEWHERE[name]}")
        owners = [policy for policy in CACHES if name in option_names(policy)]
        if cache is None and owners:
            raise ValueError(f"{name}={options[name]!r} is an option of cache policies; name one, cache={owners[0]!r}")
        if known is not None and name not in known:
            names = {"cache", *also, *known} - {*RENAMED, *ELSEWHERE}
            raise ValueError(f"unknown option {name!r}{suggest(name, names)}")
    return None if cache is None else read_cache(cache, options)


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
