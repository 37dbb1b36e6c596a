"""What the server answers, as models: the schemas of its document, against which tests hold what it really sends."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Reason = Literal["stop", "length", "abort"]


class Reply(BaseModel):
    """An object of an answer, without fields that are not described."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Reply):
    """What was wrong. param: the field that was. code: a name for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Reply):
    """Body of every refusal."""

    error: ErrorDetail


class Extension(Reply):
    """Ours. kv_bytes: the states of all choices when they were finished, kept_tokens tokens of them, as `policy` keeps
    them; kv_bytes_full: as the full cache would. not_compressed: why a policy that compresses did not."""

    policy: str
    kv_bytes: int
    kv_bytes_full: int
    kv_bytes_per_token: float
    kept_tokens: int
    not_compressed: str | None
    ttft_ms: float


class Usage(Reply):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    attnzoo: Extension


class CompletionLogprobs(Reply):
    """Log probabilities of the tokens of a text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(Reply):
    """One continuation, or a part of it in an event."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Reason | None


class Completion(Reply):
    """Body of an answer, and each event of a stream; `usage` is in bodies and, if asked for, in the last event."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(Reply):
    """A token that was likely, its bytes, and how likely."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The token that was chosen, and the most likely ones."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    """Log probabilities of the tokens of a message."""

    content: list[TokenLogprob]


class AnswerMessage(Reply):
    """What the model says."""

    role: Literal["assistant"]
    content: str


class ChatChoice(Reply):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Reason


class ChatCompletion(Reply):
    """Body of an answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class MessageDelta(Reply):
    """A part of a message: the role in the first event, text in others, nothing in the last."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(Reply):
    """A part of one answer."""

    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: Reason | None


class ChatCompletionChunk(Reply):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class ModelCard(Reply):
    """The model that is served. max_model_len: tokens of prompt and answer together."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(Reply):
    """All models: one."""

    object: Literal["list"]
    data: Annotated[list[ModelCard], Field(min_length=1)]


class Health(Reply):
    """The server is well."""

    status: Literal["ok"]


REPLIES: tuple[type[BaseModel], ...] = (
    ErrorBody,
    Completion,
    ChatCompletion,
    ChatCompletionChunk,
    ModelList,
    ModelCard,
    Health,
)


def schemas(models: tuple[type[BaseModel], ...]) -> dict[str, Any]:
    """The schemas of models and of all that they hold, by name, for components of an OpenAPI document."""
    found: dict[str, Any] = {}
    for model in models:
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        found |= schema.pop("$defs", {})
        found[model.__name__] = schema
    return found
