"""POST /v1/completions: takes prompts as texts or token ids, and answers with texts."""

from collections.abc import Sequence
from typing import Any

from attnzoo.models.sampling import TokenLogprobs
from serve.async_engine import AsyncEngine
from serve.config import ServeConfig
from serve.openai.answer import Answer, GenerationWork, check_choices, check_model, check_work, choose_cache, urgency_of
from serve.openai.attention import Desk
from serve.openai.encoding import check_tokens, encode_text
from serve.openai.errors import ApiError
from serve.openai.protocol import CompletionRequest, logprobs_object
from serve.request import Delta, FinishReason, SamplingParams

DEFAULT_MAX_TOKENS = 16


async def prepare(request: CompletionRequest, engine: AsyncEngine, config: ServeConfig, desk: Desk) -> GenerationWork:
    """The work of a completion request. Raises ApiError."""
    check_model(request.model, config)
    prompts = request.texts_or_tokens()
    copies = request.n or 1
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ApiError(400, "prompt is empty; give at least one character or token", param="prompt")
    check_choices(len(prompts), copies, config)
    cache, urgency = choose_cache(request, engine), urgency_of(request, config)
    planned = []
    choices: list[tuple[Sequence[int], SamplingParams]] = []
    for prompt in prompts:
        tokens = await encode_text(prompt, engine, "prompt") if isinstance(prompt, str) else prompt
        check_tokens(len(tokens), engine, "prompt")
        room = engine.engine.max_model_len - len(tokens)
        max_tokens = request.max_tokens or max(1, min(DEFAULT_MAX_TOKENS, room))
        planned.append((tokens, max_tokens))
        for copy in range(copies):
            params = request.sampling(max_tokens, copy)
            if copy == 0:  # the others differ only in their seed
                alone = request.attention is not None
                check_work(tokens, params, cache, engine, ("prompt", "max_tokens"), alone)
            choices.append((tokens, params))
    readings = await desk.readings(request, planned, copies)
    return GenerationWork(choices, cache, readings, urgency)


class CompletionAnswer(Answer):
    """An answer of the completions interface. The choices in chunks have the format of those in whole answers."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def choice(
        self, index: int, text: str, logprobs: list[TokenLogprobs], reason: FinishReason | None
    ) -> dict[str, Any]:
        found = None
        if self.request.alternatives is not None:
            found = logprobs_object(logprobs, self.request.alternatives, self.engine.engine.tokenizer.token_bytes)
        return {"index": index, "text": text, "logprobs": found, "finish_reason": reason}

    def news(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        return [self.choice(index, delta.text, delta.logprobs, delta.finish_reason)]
