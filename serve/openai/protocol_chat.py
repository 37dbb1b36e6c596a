"""OpenAI's chat interface, strictly read: see `serve.openai.protocol`. Conversations of text, without tools."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field, WithJsonSchema

from serve.openai.errors import ApiError
from serve.openai.protocol import GenerationRequest, Spell, Strict, parse_body, spell_token
from serve.request import MAX_LOGPROBS, TokenLogprobs

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles of the interface, and what templates call them: newer clients of OpenAI send a system text as developer's."""
PARTS = ("file", "image_url", "input_audio", "refusal", "video_url")
"""Kinds of content that clients know and this server does not take."""

TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": TEXT_PART, "minItems": 1}]}


class ChatMessage(Strict):
    """One message. Fields that clients send back as null from an answer are taken as null only."""

    role: Annotated[Any, WithJsonSchema({"enum": list(ROLES)})]
    content: Annotated[Any, WithJsonSchema(CONTENT)]
    name: Any = None
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    tool_calls: Any = None

    def plain(self, where: str) -> dict[str, str]:
        """What a template sees. `where` names the message. Raises ApiError."""
        if self.role in ("tool", "function"):
            message = f"{where}.role: tools are not supported by this server"
            raise ApiError(400, message, param=f"{where}.role", code="unsupported")
        if not isinstance(self.role, str) or self.role not in ROLES:
            raise ApiError(400, f"{where}.role must be one of {', '.join(ROLES)}", param=f"{where}.role")
        for name in ("name", "refusal", "annotations", "audio", "function_call", "tool_calls"):
            if getattr(self, name) not in (None, []):
                message = f"{where}.{name} is not supported by this server; leave it out"
                raise ApiError(400, message, param=f"{where}.{name}", code="unsupported")
        return {"role": ROLES[self.role], "content": _text(self.content, f"{where}.content")}


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions. The chat template is the model's; a request cannot bring one."""

    expected: ClassVar[dict[str, str]] = {"messages": "a list of messages, at least one"}
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "audio": (None,),
        "frequency_penalty": (None, 0),
        "function_call": (None, "none", "auto"),
        "functions": (None, []),
        "logit_bias": (None, {}),
        "metadata": (None, {}),
        "modalities": (None, ["text"]),
        "parallel_tool_calls": (None, True, False),
        "prediction": (None,),
        "presence_penalty": (None, 0),
        "reasoning_effort": (None,),
        "response_format": (None, {"type": "text"}),
        "service_tier": (None, "auto", "default"),
        "store": (None, False),
        "tool_choice": (None, "none", "auto"),
        "tools": (None, []),
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    audio: Any = None
    frequency_penalty: Any = None
    function_call: Any = None
    functions: Any = None
    logit_bias: Any = None
    metadata: Any = None
    modalities: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    presence_penalty: Any = None
    reasoning_effort: Any = None
    response_format: Any = None
    service_tier: Any = None
    store: Any = None
    tool_choice: Any = None
    tools: Any = None

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        """Tokens of the answer at most, under either of its names."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def limit_name(self) -> str:
        """The name under which it came."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def check(self) -> None:
        super().check()
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            message = "max_tokens and max_completion_tokens mean the same and differ; give one of them"
            raise ApiError(400, message, param="max_completion_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs is only allowed with logprobs=true", param="top_logprobs")
        self.conversation()

    def conversation(self) -> list[dict[str, str]]:
        """The messages as templates see them: role and text. Raises ApiError."""
        return [message.plain(f"messages[{index}]") for index, message in enumerate(self.messages)]


def parse_chat(body: bytes) -> ChatRequest:
    """Reads a body. Raises ApiError 400 naming the first field that is wrong, unknown or not supported."""
    return parse_body(ChatRequest, body)


def _text(content: Any, where: str) -> str:
    """A text, or the texts of a list of parts with newlines between them, as other servers join them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ApiError(400, f"{where} must be a text or a list of text parts, at least one", param=where)
    texts = []
    for index, part in enumerate(content):
        name = f"{where}[{index}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in PARTS:
            message = f"{name}: parts of type {kind} are not supported by this server; send text"
            raise ApiError(400, message, param=name, code="unsupported")
        if kind != "text" or not isinstance(part.get("text"), str) or len(part) != 2:
            message = f'{name} must be {{"type": "text", "text": ...}} and nothing else'
            raise ApiError(400, message, param=name)
        texts.append(part["text"])
    return "\n".join(texts)


def chat_logprobs_object(logprobs: Sequence[TokenLogprobs], spell: Spell) -> dict[str, Any]:
    """The `logprobs` of a chat's choice."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = spell(token)
        return {"token": spell_token(data), "logprob": logprob, "bytes": list(data)}

    content = [{**entry(x.token, x.logprob), "top_logprobs": [entry(*top) for top in x.top]} for x in logprobs]
    return {"content": content}
