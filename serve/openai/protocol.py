"""What clients may send, what they get back, and how refusals look: OpenAI's interface, strictly read.

A field that this server does not support is refused by name, never ignored; its neutral value is accepted.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve.openai.errors import ApiError
from serve.request import MAX_LOGPROBS, SamplingParams, TokenLogprobs


class Strict(BaseModel):
    """JSON read without conversions and without fields that nobody knows."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """`include_usage`: one more chunk before the end, with the usage of the whole request."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class GenerationRequest(Strict):
    """What both interfaces take. `top_k`, `ignore_eos`: extensions, as vLLM names them. `cache`: ours, how keys and
    values of this request are kept, {"policy": "d2o", "keep_ratio": 0.2}.

    expected: what the fields of a subclass hold, for errors. neutral: fields of OpenAI's interface without support
    here, and the values under which they change nothing.
    """

    expected: ClassVar[dict[str, str]] = {}
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    model: str
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    cache: dict[str, Any] | None = None
    user: str | None = None

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to report for each token; None: no log probabilities at all."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises ApiError for fields that do not go together."""
        for name, values in self.neutral.items():
            value = getattr(self, name)
            if not any(value == allowed and type(value) in (type(allowed), int, float) for allowed in values):
                message = f"{name} is not supported by this server; leave it out"
                raise ApiError(400, message, param=name, code="unsupported")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is only allowed with stream=true", param="stream_options")

    def sampling(self, max_tokens: int, choice: int) -> SamplingParams:
        """Parameters of the choice number `choice` (from 0 to n-1). Raises ApiError naming the field."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        try:
            return SamplingParams(
                max_tokens=max_tokens,
                temperature=1.0 if self.temperature is None else self.temperature,
                top_p=1.0 if self.top_p is None else self.top_p,
                top_k=self.top_k or 0,
                # The choices of one prompt differ, and the first is that of n=1.
                seed=None if self.seed is None else (self.seed + choice + 2**63) % 2**64 - 2**63,
                stop=tuple(stop),
                logprobs=self.alternatives,
                ignore_eos=bool(self.ignore_eos),
            )
        except ValueError as error:
            raise ApiError(400, str(error), param=str(error).split("=")[0].split()[0]) from None


Tokens = Annotated[list[int], Field(min_length=1)]


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    expected: ClassVar[dict[str, str]] = {
        "prompt": "a text, a list of token ids, a list of texts or a list of lists of token ids, none of them empty"
    }
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "best_of": (None, 1),
        "echo": (None, False),
        "frequency_penalty": (None, 0),
        "logit_bias": (None, {}),
        "presence_penalty": (None, 0),
        "suffix": (None, ""),
    }

    prompt: str | Tokens | Annotated[list[str], Field(min_length=1)] | Annotated[list[Tokens], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Any = None
    echo: Any = None
    frequency_penalty: Any = None
    logit_bias: Any = None
    presence_penalty: Any = None
    suffix: Any = None

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    def texts_or_tokens(self) -> list[str | list[int]]:
        """The prompts, one or many."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]


Body = TypeVar("Body", bound=GenerationRequest)


def parse_completion(body: bytes) -> CompletionRequest:
    """Reads a body. Raises ApiError 400 naming the first field that is wrong, unknown or not supported."""
    return parse_body(CompletionRequest, body)


def parse_body(kind: type[Body], body: bytes) -> Body:
    """Reads the body of a request of this kind. Raises ApiError as `parse_completion`."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise _explain(kind, error) from None
    request.check()
    return request


def _explain(request: type[GenerationRequest], error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False)[0]
    kind, where = first["type"], first["loc"]
    if kind == "json_invalid":
        # pydantic's message says where, and what it expected there; it does not quote the body.
        return ApiError(
            400, f"the body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}", code="invalid_json"
        )
    if not where:
        needed = " and ".join(name for name, field in request.model_fields.items() if field.is_required())
        return ApiError(400, f"the body must be a JSON object with the fields {needed}", code="invalid_json")
    name = str(where[0])
    if name in ("stream_options", "messages"):
        name += "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where[1:3])
    if kind == "extra_forbidden":
        return ApiError(400, f"unknown field {name!r}; this server does not support it", param=name, code="unsupported")
    if kind == "missing":
        return ApiError(400, f"{name} is missing", param=name)
    expected = {"stop": "a text or a list of texts", "cache": CACHE_HELP, **request.expected}
    if name in expected:
        return ApiError(400, f"{name} must be {expected[name]}", param=name)
    return ApiError(400, f"{name}: {first['msg']}", param=name)


CACHE_HELP = 'an object such as {"policy": "d2o", "keep_ratio": 0.2}'

Spell = Callable[[int], bytes]
"""The bytes of a token."""


def logprobs_object(logprobs: Sequence[TokenLogprobs], alternatives: int, spell: Spell) -> dict[str, Any]:
    """The `logprobs` of a completion's choice."""
    tops = [{spell_token(spell(token)): value for token, value in x.top} for x in logprobs]
    return {
        "tokens": [spell_token(spell(x.token)) for x in logprobs],
        "token_logprobs": [x.logprob for x in logprobs],
        "top_logprobs": tops if alternatives else None,
        "text_offset": [x.offset for x in logprobs],
    }


def spell_token(data: bytes) -> str:
    """A token's bytes as text; bytes that are no character of their own as OpenAI spells them: bytes:\\xe2\\x82."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
