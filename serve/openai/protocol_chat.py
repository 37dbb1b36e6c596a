"""The requests of OpenAI's chat interface, without tools. See `serve.openai.protocol`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field, WithJsonSchema

from attnzoo.models.sampling import TokenLogprobs
from serve.modalities.base import KINDS
from serve.openai.errors import ApiError, unsupported
from serve.openai.neutral import CHAT, SHARED, Values
from serve.openai.protocol import KNOWN, LEAST_LOGPROB, Count, GenerationRequest, Spell, Strict, parse_body, spell_token
from serve.openai.redistribution import Redistribution, read_redistribution
from serve.request import MAX_LOGPROBS

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles of the interface, and their names in chat templates: newer OpenAI clients write developer for system."""
PARTS = ("file", "input_audio", "refusal", "video_url")
"""Kinds of content in OpenAI's interface that this server does not support."""

TEXT_PART = {
    "type": "object",
    "properties": {"type": {"type": "string", "const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}


def content_schema(*parts: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of a content. parts: schemas of parts beside text."""
    items = {"anyOf": [TEXT_PART, *parts]} if parts else TEXT_PART
    return {"anyOf": [{"type": "string"}, {"type": "null"}, {"type": "array", "items": items, "minItems": 1}]}


MAX_NAME = 256
"""Longest name of a participant, in characters."""
NAME = {"anyOf": [{"type": "string", "maxLength": MAX_NAME}, {"type": "null"}]}
EMPTY: Values = (None, [])
NOTHING = {"anyOf": [{"type": "array", "items": {"type": "string"}, "maxItems": 0}, {"type": "null"}]}
REDISTRIBUTION = {"anyOf": [{"type": "boolean"}, Redistribution.model_json_schema(), {"type": "null"}]}
Unused = Annotated[Any, WithJsonSchema(NOTHING)]


@dataclass(frozen=True)
class DataPart:
    """A part of a content that is no text: {"type": kind, kind: value}. where: its name in errors."""

    kind: str
    value: Any
    where: str


class ChatMessage(Strict):
    """One message; null content is an empty text. Clients return an earlier answer with fields that this server does
    not support; these must be null or empty."""

    role: Annotated[Any, WithJsonSchema({"type": "string", "enum": list(ROLES)})]
    content: Annotated[Any, WithJsonSchema(content_schema())]
    name: Annotated[Any, WithJsonSchema(NAME)] = None
    refusal: Unused = None
    annotations: Unused = None
    audio: Unused = None
    function_call: Unused = None
    tool_calls: Unused = None
    reasoning: Unused = None
    reasoning_content: Unused = None

    def plain(self, where: str) -> dict[str, Any]:
        """Role, content and name: the content as a text, or as a list of texts and `DataPart`. where: the message's
        name in errors. Raises ApiError."""
        if isinstance(self.role, str) and self.role in ("tool", "function"):
            raise unsupported(f"{where}.role", "of a tool is not supported by this server: it has no tools")
        if not isinstance(self.role, str) or self.role not in ROLES:
            raise ApiError(400, f"{where}.role must be one of {', '.join(ROLES)}", param=f"{where}.role")
        for name in UNUSED:
            if getattr(self, name) not in EMPTY:
                raise unsupported(f"{where}.{name}")
        found: dict[str, Any] = {"role": ROLES[self.role], "content": _content(self.content, f"{where}.content")}
        if not isinstance(found["content"], str) and self.role != "user":
            what = f"{where}.content holds parts that are no text; only messages of the role user may"
            raise ApiError(400, what, param=f"{where}.content")
        if self.name is not None:
            if not isinstance(self.name, str) or len(self.name) > MAX_NAME:
                message = f"{where}.name must be a text of at most {MAX_NAME} characters"
                raise ApiError(400, message, param=f"{where}.name")
            found["name"] = self.name
        return found


KNOWN["messages"] = ChatMessage.model_fields
UNUSED = [name for name in ChatMessage.model_fields if name not in ("role", "content", "name")]


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions. The chat template is always the model's. `redistribution` is this server's:
    attention of sinks is given to the picture (`serve.openai.redistribution`), true with the numbers of its paper."""

    expected: ClassVar[dict[str, str]] = {
        "messages": "a list of messages, at least one",
        "redistribution": 'true, false, or an object such as {"p": 0.6, "rho": 0.8}',
    }
    neutral: ClassVar[Mapping[str, Values]] = {**SHARED, **CHAT}

    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    redistribution: Annotated[bool | dict[str, Any] | None, WithJsonSchema(REDISTRIBUTION)] = None

    @property
    def redistributes(self) -> Redistribution | None:
        """What `redistribution` says. Raises ApiError."""
        return read_redistribution(self.redistribution)

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer, from max_completion_tokens or max_tokens."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def limit_name(self) -> str:
        """The field that set `limit`."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def check(self) -> None:
        super().check()
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            message = "max_tokens and max_completion_tokens mean the same and differ; give one of them"
            raise ApiError(400, message, param="max_completion_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs is only allowed with logprobs=true", param="top_logprobs")
        _ = self.redistributes
        self.conversation()

    def conversation(self) -> list[dict[str, Any]]:
        """The messages, as `ChatMessage.plain` returns them. Raises ApiError."""
        return [message.plain(f"messages[{index}]") for index, message in enumerate(self.messages)]


def parse_chat(body: bytes) -> ChatRequest:
    """Parses a body. Raises ApiError 400 that names the first field that is wrong, unknown or not supported."""
    return parse_body(ChatRequest, body)


def _content(content: Any, where: str) -> str | list[str | DataPart]:
    """A message's content; text parts alone are joined with newlines, as other servers do. Raises ApiError."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ApiError(400, f"{where} must be a text or a list of text parts, at least one", param=where)
    parts = [_part(part, f"{where}[{index}]") for index, part in enumerate(content)]
    texts = [part for part in parts if isinstance(part, str)]
    return "\n".join(texts) if len(texts) == len(parts) else parts


def _part(part: Any, name: str) -> str | DataPart:
    given = part if isinstance(part, dict) else {}
    kind, text = given.get("type"), given.get("text")
    if kind in PARTS:
        raise unsupported(name, f"is of type {kind}, which is not supported by this server; send text")
    if isinstance(kind, str) and kind in KINDS:
        if kind in given and len(given) == 2:
            return DataPart(kind, given[kind], name)
        raise ApiError(400, f'{name} must be {{"type": "{kind}", "{kind}": ...}} and nothing else', param=name)
    if kind != "text" or not isinstance(text, str) or len(given) != 2:
        raise ApiError(400, f'{name} must be {{"type": "text", "text": ...}} and nothing else', param=name)
    return text


def chat_logprobs_object(logprobs: Sequence[TokenLogprobs], spell: Spell) -> dict[str, Any]:
    """The `logprobs` object of a chat's choice."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = spell(token)
        return {"token": spell_token(data), "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(data)}

    content = [{**entry(x.token, x.logprob), "top_logprobs": [entry(*top) for top in x.top]} for x in logprobs]
    return {"content": content}
