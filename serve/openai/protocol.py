"""The requests of OpenAI's completions interface, and what both interfaces share.

A field that this server does not support is refused by name unless it has its neutral value; none is ignored.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from attnzoo.models.sampling import MOST_BIAS, MOST_PENALTY, MOST_REPETITION, TokenLogprobs, choice_seed
from serve.openai.echo import Echo
from serve.openai.errors import MAX_NAME, ApiError, short_name, unsupported
from serve.openai.json_body import MOST, read_object
from serve.openai.neutral import COMPLETION, SHARED, Values, take_neutral
from serve.request import (
    MAX_BIASED,
    MAX_DEADLINE_S,
    MAX_LOGPROBS,
    MAX_PRIORITY,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
    SamplingParams,
    Urgency,
)

MAX_LABEL = 512
"""Longest name of a user, session or cache, in characters."""
LEAST_LOGPROB = -9999.0
"""Replaces the logarithm of zero, which JSON cannot express."""


class Strict(BaseModel):
    """Base class of request objects: no type conversions, and unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """include_usage: send one more chunk before the end, with the usage of the whole request."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: Annotated[
        bool | None, WithJsonSchema({"anyOf": [{"type": "boolean", "const": False}, {"type": "null"}]})
    ] = None


Label = Annotated[str, Field(max_length=MAX_LABEL)]
Count = Annotated[int, Field(ge=1, le=MOST)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
# Validation of a list ends at its first error, because pydantic holds the GIL while it collects errors.
Penalty = Annotated[float, Field(ge=-MOST_PENALTY, le=MOST_PENALTY)]
TokenId = Annotated[int, Field(ge=0, le=MOST)]
StopTokens = Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_STOP_TOKENS)]
TokenName = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Biases = Annotated[dict[TokenName, Annotated[float, Field(ge=-MOST_BIAS, le=MOST_BIAS)]], Field(max_length=MAX_BIASED)]
Stop = StopText | Annotated[list[StopText], Field(fail_fast=True, max_length=MAX_STOP_STRINGS)]


class GenerationRequest(Strict):
    """The fields of both interfaces. `top_k` (0 or -1: off), `min_p`, `repetition_penalty`, `stop_token_ids`,
    `min_tokens`, `ignore_eos` and `priority` (`serve.request.Urgency`) are vLLM's extensions. This server's are
    `cache`, the cache policy, {"policy": "d2o", "keep_ratio": 0.2}; `attention`, what is read and edited of attention
    (`serve.openai.attention`); and `deadline_s`. `user`, `session_id`, `safety_identifier`, `prompt_cache_key`,
    `cache_salt` and `metadata` identify the sender and change no answer.

    expected: descriptions of a subclass's fields, for error messages. neutral: unsupported fields and their neutral
    values (`serve.openai.neutral`).
    """

    expected: ClassVar[dict[str, str]] = {}
    neutral: ClassVar[Mapping[str, Values]] = SHARED

    model: str
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MOST)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=MOST_REPETITION)] | None = None
    logit_bias: Biases | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=MOST)] | None = None
    n: Count | None = None
    stop: Stop | None = None
    stop_token_ids: StopTokens | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MOST)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    cache: dict[str, Any] | None = None
    attention: dict[str, Any] | None = None
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    deadline_s: Annotated[float, Field(gt=0, le=MAX_DEADLINE_S)] | None = None
    user: Label | None = None
    session_id: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    cache_salt: Label | None = None
    metadata: Annotated[dict[Label, Label], Field(max_length=16)] | None = None

    @property
    def alternatives(self) -> int | None:
        """Number of alternatives to report for each token; None: no log probabilities."""
        raise NotImplementedError

    @property
    def prompt_alternatives(self) -> int | None:
        """The same for the tokens of the prompt."""
        return None

    def check(self) -> None:
        """Raises ApiError for fields that contradict one another."""
        if self.stream_options is not None and self.stream_options.continuous_usage_stats:
            raise unsupported("stream_options.continuous_usage_stats")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is only allowed with stream=true", param="stream_options")

    @property
    def urgency(self) -> Urgency:
        """Its place among other requests."""
        return Urgency(priority=self.priority or 0, deadline_s=self.deadline_s)

    def sampling(self, max_tokens: int, choice: int) -> SamplingParams:
        """Sampling parameters of choice number `choice` (from 0 to n-1). Raises ApiError that names the field."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        try:
            return SamplingParams(
                max_tokens=max_tokens,
                temperature=1.0 if self.temperature is None else self.temperature,
                top_p=1.0 if self.top_p is None else self.top_p,
                top_k=max(self.top_k or 0, 0),
                min_p=self.min_p or 0.0,
                presence_penalty=self.presence_penalty or 0.0,
                frequency_penalty=self.frequency_penalty or 0.0,
                repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
                logit_bias={int(token): value for token, value in (self.logit_bias or {}).items()},
                stop_token_ids=tuple(self.stop_token_ids or ()),
                min_tokens=self.min_tokens or 0,
                # The choices of a prompt differ, and the first is the same as with n=1.
                seed=None if self.seed is None else choice_seed(self.seed, choice),
                stop=tuple(stop),
                logprobs=self.alternatives,
                prompt_logprobs=self.prompt_alternatives,
                ignore_eos=bool(self.ignore_eos),
                counts_prompt=choice == 0,
            )
        except ValueError as error:
            raise ApiError(400, str(error), param=str(error).split("=")[0].split()[0]) from None


Tokens = Annotated[list[int], Field(fail_fast=True, min_length=1)]


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    expected: ClassVar[dict[str, str]] = {
        "prompt": "a text, a list of token ids, a list of texts or a list of lists of token ids, none of them empty"
    }
    neutral: ClassVar[Mapping[str, Values]] = {**SHARED, **COMPLETION}

    prompt: (
        str
        | Tokens
        | Annotated[list[str], Field(fail_fast=True, min_length=1)]
        | Annotated[list[Tokens], Field(fail_fast=True, min_length=1)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=MOST)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def prompt_alternatives(self) -> int | None:
        return self.logprobs if self.echo else None

    def check(self) -> None:
        super().check()
        if self.max_tokens == 0 and not self.echo:
            message = "max_tokens=0 is only allowed with echo=true, which returns the prompt; give at least 1"
            raise ApiError(400, message, param="max_tokens")

    def texts_or_tokens(self) -> list[str | list[int]]:
        """The prompts as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]


Body = TypeVar("Body", bound=GenerationRequest)


def parse_completion(body: bytes) -> CompletionRequest:
    """Parses a body. Raises ApiError 400 that names the first field that is wrong, unknown or not supported."""
    return parse_body(CompletionRequest, body)


def parse_body(kind: type[Body], body: bytes) -> Body:
    """Parses the body of a request of class `kind`. Raises ApiError as `parse_completion` does."""
    values = read_object(body, " and ".join(n for n, field in kind.model_fields.items() if field.is_required()))
    take_neutral(values, kind.neutral)
    try:
        request = kind.model_validate(values)
    except ValidationError as error:
        raise _explain(kind, error) from None
    request.check()
    return request


def _explain(request: type[GenerationRequest], error: ValidationError) -> ApiError:
    found = error.errors(include_url=False, include_context=False)
    first = found[0]
    if first["type"] == "missing":  # perhaps it is there under a wrong name
        first = next((each for each in found if each["type"] == "extra_forbidden"), first)
    kind, where = first["type"], first["loc"]
    name = short_name(str(where[0]))
    if name in ("stream_options", "messages"):
        parts = (f"[{part}]" if isinstance(part, int) else f".{short_name(part)}" for part in where[1:3])
        name += "".join(parts)
    if kind == "extra_forbidden":
        known = KNOWN.get(str(where[0]), request.model_fields) if len(where) > 1 else request.model_fields
        near = get_close_matches(str(where[-1])[:MAX_LABEL], known, n=1, cutoff=0.6)
        way_out = f"did you mean {near[0]!r}?" if near else "this server does not support it"
        return ApiError(400, f"unknown field {name!r}; {way_out}", param=name, code="unsupported")
    if kind == "missing":
        return ApiError(400, f"{name} is missing", param=name)
    expected = {
        "stop": STOP_HELP,
        "stop_token_ids": STOP_TOKENS_HELP,
        "logit_bias": BIAS_HELP,
        "cache": CACHE_HELP,
        "attention": ATTENTION_HELP,
        "metadata": METADATA_HELP,
        **request.expected,
    }
    if name in expected:
        return ApiError(400, f"{name} must be {expected[name]}", param=name)
    value = "" if where[0] in ("messages", "prompt") else f"={shown(first['input'])}"  # texts are not quoted
    return ApiError(400, f"{name}{value} {must(first['msg'])}", param=name)


def must(message: str) -> str:
    """What pydantic says of a value, in the words of the other errors."""
    message = message.replace(" after validation", "")  # of a list, which its client has not seen validated
    return re.sub(r"^(Input|\w+) should ", "must ", message) if " should " in message else f"is wrong: {message}"


def shown(value: Any) -> str:
    """A value as JSON, shortened."""
    text = json.dumps(value, default=str)
    return text if len(text) <= MAX_NAME else f"{text[:MAX_NAME]}..."


KNOWN: dict[str, Any] = {"stream_options": StreamOptions.model_fields}
"""Fields of the objects in a request, by the request's field."""
STOP_HELP = f"a text or a list of at most {MAX_STOP_STRINGS} texts, of 1 to {MAX_STOP_LENGTH} characters each"
STOP_TOKENS_HELP = f"a list of at most {MAX_STOP_TOKENS} token ids"
BIAS_HELP = (
    f"an object of at most {MAX_BIASED} token ids, written as texts, with numbers from -{MOST_BIAS:g} to "
    f"{MOST_BIAS:g}: "
    '{"50256": -100}'
)
METADATA_HELP = f"at most 16 names with a text each, of at most {MAX_LABEL} characters"
CACHE_HELP = 'an object such as {"policy": "d2o", "keep_ratio": 0.2}'
ATTENTION_HELP = 'an object such as {"edits": [...], "read": [{"mass": {"where": {"layers": -1, "keys": 0}}}]}'

Spell = Callable[[int], bytes]
"""Returns the bytes of a token id."""


def logprobs_object(
    logprobs: Sequence[TokenLogprobs], alternatives: int, spell: Spell, echo: Echo | None = None
) -> dict[str, Any]:
    """The `logprobs` object of a completion's choice. echo: the prompt, if it stands before the text."""
    given, known, before = ((), (), ()) if echo is None else (echo.tokens, echo.logprobs, echo.offsets)
    every = [*known, *logprobs]
    return {
        "tokens": [spell_token(spell(token)) for token in (*given, *(x.token for x in logprobs))],
        "token_logprobs": [None if x is None else max(x.logprob, LEAST_LOGPROB) for x in every],
        "top_logprobs": [None if x is None else _top(x, spell) for x in every] if alternatives else None,
        "text_offset": [*before, *(x.offset for x in logprobs)],
    }


def _top(logprobs: TokenLogprobs, spell: Spell) -> dict[str, float]:
    return {spell_token(spell(token)): max(value, LEAST_LOGPROB) for token, value in logprobs.top}


def spell_token(data: bytes) -> str:
    """A token's bytes as text; incomplete UTF-8 is written as OpenAI does: bytes:\\xe2\\x82."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
