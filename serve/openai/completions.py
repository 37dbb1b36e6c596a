"""POST /v1/completions: takes prompts as texts or token ids, and answers with texts."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from attnzoo.models.sampling import TokenLogprobs
from serve.async_engine import AsyncEngine
from serve.config import ServeConfig
from serve.openai.answer import Answer, GenerationWork, check_choices, check_model, check_work, choose_cache, urgency_of
from serve.openai.attention import Desk
from serve.openai.echo import echo_of
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
        # Of a prompt alone, too, the model chooses a token; it is not sent.
        max_tokens = max(1, min(DEFAULT_MAX_TOKENS, room) if request.max_tokens is None else request.max_tokens)
        planned.append((tokens, max_tokens))
        for copy in range(copies):
            params = request.sampling(max_tokens, copy)
            if copy == 0:  # the others differ only in their seed
                alone = request.attention is not None
                check_work(tokens, params, cache, engine, ("prompt", "max_tokens"), alone)
            choices.append((tokens, params))
    readings = await desk.readings(request, planned, copies)
    return GenerationWork(choices, cache, readings, urgency, prompts)


class CompletionAnswer(Answer):
    """An answer of the completions interface. The choices in chunks have the format of those in whole answers; with
    `echo` the prompt stands in the first of them, and with max_tokens=0 nothing else does."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"
    request: CompletionRequest

    def __init__(
        self, request: CompletionRequest, engine: AsyncEngine, work: GenerationWork, *, interval_s: float = 0.0
    ) -> None:
        super().__init__(request, engine, work, interval_s=interval_s)
        copies = request.n or 1
        prompts = [(work.sent[index // copies], tokens) for index, (tokens, _) in enumerate(work.choices)]
        self.unsent = dict(enumerate(prompts)) if request.echo else {}
        """Prompts that are to be sent before their choices, by index."""
        self.behind: dict[int, int] = {}
        """Characters of the prompts that were sent, by index."""
        self.scores: dict[int, list[TokenLogprobs | None]] = {}

    async def _note(self, news: list[Delta]) -> None:
        found = [delta for delta in news if delta.prompt_logprobs is not None]
        self.scores |= {self.index[delta.request_id]: delta.prompt_logprobs or [] for delta in found}
        await super()._note(news)

    def choice(
        self, index: int, text: str, logprobs: list[TokenLogprobs], reason: FinishReason | None
    ) -> dict[str, Any]:
        if self.only_prompt:
            text, logprobs, reason = "", [], "length" if reason == "stop" else reason
        tokenizer, echo, found = self.engine.engine.tokenizer, None, None
        if index in self.unsent:
            echo = echo_of(*self.unsent.pop(index), tokenizer, self.scores.get(index))
            text, self.behind[index] = echo.text + text, len(echo.text)
        behind = self.behind.get(index, 0)
        logprobs = [replace(each, offset=behind + each.offset) for each in logprobs]
        if self.request.alternatives is not None:
            found = logprobs_object(logprobs, self.request.alternatives, tokenizer.token_bytes, echo)
        return {"index": index, "text": text, "logprobs": found, "finish_reason": reason}

    def news(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        return [self.choice(index, delta.text, delta.logprobs, delta.finish_reason)]

    @property
    def only_prompt(self) -> bool:
        """Whether nothing but the prompt is sent."""
        return self.request.max_tokens == 0

    @property
    def completion_tokens(self) -> int:
        return 0 if self.only_prompt else super().completion_tokens
