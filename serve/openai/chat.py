"""POST /v1/chat/completions: encodes a conversation with the model's chat template, and answers with messages."""

from typing import Any

from attnzoo.models.sampling import TokenLogprobs
from serve.async_engine import AsyncEngine
from serve.config import ServeConfig
from serve.openai.answer import Answer, GenerationWork, check_choices, check_model, check_work, choose_cache, urgency_of
from serve.openai.attention import Desk
from serve.openai.content import encode_chat
from serve.openai.errors import ApiError
from serve.openai.protocol_chat import ChatRequest, chat_logprobs_object
from serve.openai.redistribution import redistributed
from serve.request import Delta, FinishReason


async def prepare_chat(request: ChatRequest, engine: AsyncEngine, config: ServeConfig, desk: Desk) -> GenerationWork:
    """The work of a chat request. Without a length limit an answer may fill the context. Raises ApiError."""
    check_model(request.model, config)
    if engine.engine.chat_template is None:
        message = f"the model {config.served_name!r} has no chat template; use /v1/completions with a prompt"
        raise ApiError(400, message, param="model", code="no_chat_template")
    copies = request.n or 1
    check_choices(1, copies, config)
    cache, urgency = choose_cache(request, engine), urgency_of(request, config)
    messages, tokens = await encode_chat(request.conversation(), engine, "messages")
    given = await redistributed(request.redistributes, tokens, engine, config)
    limit = request.limit or max(1, engine.engine.max_model_len - len(tokens))
    choices = []
    for copy in range(copies):
        params = request.sampling(limit, copy)
        if copy == 0:  # the others differ only in their seed
            alone = request.attention is not None or given is not None
            check_work(tokens, params, cache, engine, ("messages", request.limit_name), alone)
        choices.append((tokens, params))
    readings = await desk.readings(request, [(tokens, limit)], copies, messages, given)
    return GenerationWork(choices, cache, readings, urgency)


class ChatAnswer(Answer):
    """An answer of the chat interface. The first chunk of a choice has the role, the last one the finish_reason."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self, request: ChatRequest, engine: AsyncEngine, work: GenerationWork, *, interval_s: float = 0.0
    ) -> None:
        super().__init__(request, engine, work, interval_s=interval_s)
        self.begun: set[int] = set()
        pictures = engine.engine.pictures
        self.lead = "" if pictures is None else pictures.turns.lead
        self.held: dict[int, str | None] = {}
        """By choice, the beginning of its text, as long as `lead` may begin with it; None: it is beyond that."""

    def choice(self, index: int, text: str, logprobs: list[TokenLogprobs], reason: FinishReason) -> dict[str, Any]:
        message = {"role": "assistant", "content": text.removeprefix(self.lead)}
        return {"index": index, "message": message, "logprobs": self._logprobs(logprobs), "finish_reason": reason}

    def news(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        chunks = []
        if index not in self.begun:
            self.begun.add(index)
            chunks.append(_chunk(index, {"role": "assistant", "content": ""}))
        text = self._led(index, delta.text, delta.finish_reason is not None)
        if text or delta.logprobs:
            chunks.append(_chunk(index, {"content": text}, self._logprobs(delta.logprobs)))
        if delta.finish_reason is not None:
            chunks.append(_chunk(index, {}, reason=delta.finish_reason))
        return chunks

    def _led(self, index: int, text: str, last: bool) -> str:
        """The next text of a choice, without what a model of pictures has learned to write before an answer."""
        held = self.held.get(index, "")
        if held is None:
            return text
        text = held + text
        if not last and len(text) < len(self.lead) and self.lead.startswith(text):
            self.held[index] = text
            return ""
        self.held[index] = None
        return text.removeprefix(self.lead)

    def _logprobs(self, logprobs: list[TokenLogprobs]) -> dict[str, Any] | None:
        if self.request.alternatives is None:
            return None
        return chat_logprobs_object(logprobs, self.engine.engine.tokenizer.token_bytes)


def _chunk(
    index: int, delta: dict[str, str], logprobs: dict[str, Any] | None = None, reason: FinishReason | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
