"""Pydantic models of the server's answers: the source of the OpenAPI schemas. Tests check real answers with them."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Reason = Literal["stop", "length", "deadline", "abort"]


class Reply(BaseModel):
    """Base class of the objects in answers; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Reply):
    """An error. message: for people. param: the field that is wrong. code: an identifier for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Reply):
    """Body of every error answer."""

    error: ErrorDetail


class Extension(Reply):
    """Extension of this server: the cache `policy` and its memory. kv_bytes: bytes of the states of all choices at
    their end, with kept_tokens tokens; kv_bytes_full: bytes that the full cache would take. not_compressed: why the
    policy did not compress. not_cached: why no beginning of the prompt could be copied from an earlier one. ttft_ms:
    time to the first token."""

    policy: str
    kv_bytes: int
    kv_bytes_full: int
    kv_bytes_per_token: float
    kept_tokens: int
    not_compressed: str | None
    not_cached: str | None
    ttft_ms: float


class PromptDetails(Reply):
    """cached_tokens: tokens of the prompts that were copied from earlier ones, not computed."""

    cached_tokens: int


class CompletionDetails(Reply):
    """Of the tokens that were drafted (`prompt_lookup`), those that the model chose, too, and the others, which
    are in no text."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(Reply):
    """Number of tokens in prompts and completions."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails
    attnzoo: Extension


class CompletionLogprobs(Reply):
    """Log probabilities of the tokens of a text; null for the first token of a prompt (`echo`)."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class MapFile(Reply):
    """A map of attention, a .npy file at `url` until `expires_at` (seconds since 1970): [heads, queries, keys]."""

    shape: list[int]
    dtype: str
    bytes: int
    id: str
    url: str
    expires_at: int


class AttentionRead(Reply):
    """What one read found in one layer. read: its index in the request. queries, keys: positions as [start, stop) of
    what was computed. values: numbers [heads, queries] and more axes by name, those of `key_sums` [heads, keys]. map:
    in place of values where a map was read."""

    read: int
    kind: Literal["mass", "top_keys", "key_sums", "entropy", "map"]
    layer: int
    heads: list[int]
    queries: list[list[int]]
    keys: list[list[int]] | None
    values: dict[str, list[list[float | int | list[int] | list[float] | None]]]
    map: MapFile | None


class AttentionLayer(Reply):
    """How a layer was read. engine: what computed it. approximate: scores are of keys that lack channels. empty_rows:
    pairs of head and query that see nothing. evicted, merged: by head, positions that the cache gave up, and entries
    that stand for several tokens (null: the cache merges and does not count them)."""

    layer: int
    engine: str
    approximate: bool
    empty_rows: int
    evicted: list[int]
    merged: list[int] | None


class AttentionReply(Reply):
    """What a choice has read of attention."""

    layers: list[AttentionLayer]
    read: list[AttentionRead]


class RedistributedLayer(Reply):
    """What one layer gave to the picture, at so many queries. sinks: their positions. heads: those that were changed at
    any query. moved: of each of them, the weight that its sinks gave, as a mean over the queries. picture, sink: the
    weight of the picture and of all sinks before and after, as means over all heads and queries."""

    layer: int
    queries: int
    sinks: list[int]
    heads: list[int]
    moved: list[float]
    picture: list[float]
    sink: list[float]


class RedistributionReply(Reply):
    """What a choice's field `redistribution` did. p, rho, least: as in the request; layers: those with sinks."""

    p: float
    rho: float
    least: float
    layers: list[RedistributedLayer]


class CompletionChoice(Reply):
    """One continuation, or a part of it in an event. attention: where the request has the field, at the end."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Reason | None
    attention: AttentionReply | None = None


class Completion(Reply):
    """Body of an answer, and each event of a stream; bodies have `usage`, and so does the last event on request."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(Reply):
    """A token, its bytes, and its log probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The chosen token, and the most likely tokens in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    """Log probabilities of the tokens of a message."""

    content: list[TokenLogprob]


class AnswerMessage(Reply):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str


class ChatChoice(Reply):
    """One answer. attention, redistribution: where the request has the field."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Reason
    attention: AttentionReply | None = None
    redistribution: RedistributionReply | None = None


class ChatCompletion(Reply):
    """Body of an answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class MessageDelta(Reply):
    """A part of a message: the role in the first event, text in the following ones, nothing in the last."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(Reply):
    """A part of one answer. attention, redistribution: in its last chunk, where the request has the field."""

    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: Reason | None
    attention: AttentionReply | None = None
    redistribution: RedistributionReply | None = None


class ChatCompletionChunk(Reply):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class AttentionOfLayer(Reply):
    """What can be read, and edited before (scores) and after the softmax (weights). heads: numbers 0 to heads - 1."""

    layer: int
    variant: str
    heads: int
    kv_heads: int
    reads: bool
    scores: bool
    weights: bool
    why_not: str | None


class AttentionCard(Reply):
    """What requests may do with attention. max_bytes: most bytes that the reads of one request return."""

    allowed: Literal["off", "read", "edit"]
    max_bytes: int
    layers: list[AttentionOfLayer]


class SensorVariable(Reply):
    """A daily sensor. units: those that are known for it; plausible: values beyond are clipped."""

    name: str
    meaning: str
    unit: str
    plausible: list[float]
    units: list[str]


class SensorTraining(Reply):
    """The prompt that the adapter was trained with, and its questions by label."""

    template: str
    questions: dict[str, str]


class SensorCard(Reply):
    """Parts of the type sensor_data: days of each sensor, and tokens of the prompt that a part takes."""

    days: int
    embeddings: int
    variables: list[SensorVariable]
    trained_with: SensorTraining


class ImageCard(Reply):
    """Parts of the type image_url. formats: kinds of files; size: pixels of a side that the model sees; embeddings:
    tokens of the prompt that a picture takes; max_images: of a conversation; max_bytes, max_pixels: of a file."""

    formats: list[str]
    size: int
    embeddings: int
    max_images: int
    max_bytes: int
    max_pixels: int


class ContentCard(Reply):
    """Parts of messages that the model takes beside text; null for those that it does not."""

    image_url: ImageCard | None = None
    sensor_data: SensorCard | None = None


class ModelCard(Reply):
    """The served language model. max_model_len: most tokens of prompt and answer together. dtype: of its weights;
    prompt_dtype: of the products of prompts; threads: that it computes with; the rest: settings."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    kind: Literal["language"]
    max_model_len: int
    dtype: str
    prompt_dtype: str
    threads: int
    compile_decode: bool
    prompt_lookup: int
    content: ContentCard
    attention: AttentionCard


class TokenList(Reply):
    """The tokens of a prompt. max_model_len: most tokens of prompt and answer together."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class TokenText(Reply):
    """The text of tokens."""

    prompt: str


class TokenizerInfo(Reply):
    """The tokenizer: spellings of its control tokens, and the template that turns a conversation into a text."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    vocab_size: int
    chat_template: str | None


class Health(Reply):
    """Body of /health and /ready if the server is healthy and takes requests."""

    status: Literal["ok"]


class Version(Reply):
    """The version of attnzoo."""

    version: str


REPLIES: tuple[type[BaseModel], ...] = (
    ErrorBody,
    Completion,
    ChatCompletion,
    ChatCompletionChunk,
    ModelCard,
    Health,
    Version,
)
TOKENS: tuple[type[BaseModel], ...] = (TokenList, TokenText, TokenizerInfo)
"""Answers about tokens, of a language model."""


def schemas(models: tuple[type[BaseModel], ...]) -> dict[str, Any]:
    """The JSON schemas of models and of the models in their fields, by name, for components of an OpenAPI document."""
    found: dict[str, Any] = {}
    for model in models:
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        found |= schema.pop("$defs", {})
        found[model.__name__] = schema
    return found
