"""Shared by both interfaces: checks a request, hands it to the engine, and sends the answer, whole or as events."""

import asyncio
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from attnzoo.kvcache.choice import CacheChoice
from attnzoo.models.sampling import TokenIdError, TokenLogprobs
from serve.async_engine import AsyncEngine, EngineFailedError, EngineUnavailableError, RequestFailedError, Stream
from serve.config import ServeConfig
from serve.openai.encoding import too_long
from serve.openai.errors import MAX_QUOTED, ApiError, dump, event, short_name
from serve.openai.protocol import GenerationRequest
from serve.openai.readings import Readings
from serve.request import (
    USUAL,
    CacheMemoryError,
    ContextLengthError,
    Delta,
    FinishReason,
    SamplingParams,
    Urgency,
)
from serve.scheduling import QueueFullError


@dataclass(frozen=True)
class GenerationWork:
    """Prompt and parameters of every choice in the order of its index, the cache and the urgency of all of them, what
    they read and edit of attention, and the prompts as they were sent."""

    choices: list[tuple[Sequence[int], SamplingParams]]
    cache: CacheChoice
    readings: Readings | None = None
    urgency: Urgency = USUAL
    sent: Sequence[str | Sequence[int]] = ()


def check_model(name: str, config: ServeConfig) -> None:
    """Raises ApiError 404 if `name` is not the served model."""
    if name != config.served_name:
        raise no_model(name, config.served_name)


def no_model(name: str, *known: str) -> ApiError:
    """The error for a model that is not among those of the server, or not of the kind that a path takes."""
    message = f"the model {short_name(name)!r} does not exist; this server has {', '.join(map(repr, known))}"
    return ApiError(404, message, param="model", code="model_not_found")


def check_choices(prompts: int, copies: int, config: ServeConfig) -> None:
    """Raises ApiError if prompts times n exceed the completions that one request may have."""
    most = min(config.max_choices, config.max_num_seqs + config.max_queue)  # more could not be queued together
    if prompts * copies > most:
        message = f"{prompts} prompts times n={copies} are more than the {most} completions allowed"
        raise ApiError(400, f"{message} in one request", param="n" if copies > 1 else "prompt")


def choose_cache(request: GenerationRequest, engine: AsyncEngine) -> CacheChoice:
    """The request's cache. Raises ApiError if it is wrong or not allowed."""
    try:
        return engine.engine.choose_cache(request.cache)
    except ValueError as error:
        raise ApiError(400, str(error)[:MAX_QUOTED], param="cache") from None


def urgency_of(request: GenerationRequest, config: ServeConfig) -> Urgency:
    """Its place among other requests. Raises ApiError for a priority where there are none."""
    if request.priority and not config.priorities:
        message = f"priority={request.priority}: this server takes all requests alike (priorities: false); leave it out"
        raise ApiError(400, message, param="priority")
    return request.urgency


def check_work(
    tokens: Sequence[int],
    params: SamplingParams,
    cache: CacheChoice,
    engine: AsyncEngine,
    names: tuple[str, str],
    alone: bool = False,
) -> None:
    """Raises ApiError for a prompt that the model cannot continue. names: the fields of prompt and length limit. alone:
    the request reads or edits attention."""
    prompt, limit = names
    try:
        engine.engine.check(tokens, params, cache, alone)
    except CacheMemoryError as error:
        raise ApiError(400, str(error), param="cache", code="cache_memory_exceeded") from None
    except TokenIdError as error:
        raise ApiError(400, str(error), param=error.param) from None
    except ContextLengthError as error:
        param = prompt if len(tokens) >= engine.engine.max_model_len else limit
        raise too_long(error, param) from None
    except ValueError as error:
        raise ApiError(400, str(error), param=prompt) from None


def submit(engine: AsyncEngine, work: GenerationWork) -> Stream:
    """Submits the choices to the engine. Raises ApiError 429 or 503."""
    plans = None if work.readings is None else work.readings.plans
    tokens, params = [tokens for tokens, _ in work.choices], [params for _, params in work.choices]
    try:
        return engine.submit(tokens, params, work.cache, plans, work.urgency)
    except QueueFullError as error:
        message = f"the server is at its limit ({error}); try again in a moment"
        raise ApiError(429, message, code="queue_full", headers={"retry-after": "1"}) from None
    except EngineUnavailableError as error:
        raise ApiError(503, str(error), code="unavailable", headers={"retry-after": "5"}) from None


class Answer(Response):
    """The response to a generation request. It submits the request, and aborts it when the client disconnects.

    Subclasses define the JSON objects of their interface. interval_s: shortest time between two events of a stream.
    """

    prefix: str
    whole: str
    chunk: str

    def __init__(
        self, request: GenerationRequest, engine: AsyncEngine, work: GenerationWork, *, interval_s: float = 0.0
    ) -> None:
        super().__init__()
        self.request, self.engine, self.interval_s = request, engine, interval_s
        self.readings = work.readings
        try:
            self.stream = submit(engine, work)
        except BaseException:
            self._end_readings()
            raise
        self.prompt_tokens = sum(len(tokens) for tokens, _ in work.choices[:: request.n or 1])
        self.index = {request_id: index for index, request_id in enumerate(self.stream.request_ids)}
        self.last: dict[str, Delta] = {}
        self.head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "object": self.chunk if request.stream else self.whole,
            "created": int(time.time()),
            "model": request.model,
        }

    def choice(self, index: int, text: str, logprobs: list[TokenLogprobs], reason: FinishReason) -> dict[str, Any]:
        """The JSON object of a finished choice."""
        raise NotImplementedError

    def news(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """The JSON objects of a choice in the chunks for `delta`, one a chunk."""
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(self._watch(receive))
        try:
            await (self._events(send) if self.request.stream else self._whole(scope, receive, send))
        except OSError:
            pass  # the client disconnected during a write
        finally:
            self.stream.close()
            watcher.cancel()
            self._end_readings()

    def _end_readings(self) -> None:
        if self.readings is not None:
            self.readings.room.close()

    async def _note(self, news: list[Delta]) -> None:
        if self.readings is not None:
            await self.readings.take(news)

    def _with_attention(self, choice: dict[str, Any], request_id: str) -> dict[str, Any]:
        """A choice that ends, with what it has read and changed of attention if it was asked to."""
        return choice if self.readings is None else choice | self.readings.reply(request_id)

    def _delivered(self) -> None:
        """The client has the whole answer."""
        if self.readings is not None:
            self.readings.room.deliver()

    async def _watch(self, receive: Receive) -> None:
        """Aborts the request when the client disconnects."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.stream.close()

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        texts = [""] * len(self.index)
        logprobs: list[list[TokenLogprobs]] = [[] for _ in texts]
        try:
            while news := await self.stream.next():
                await self._note(news)
                for delta in news:
                    texts[self.index[delta.request_id]] += delta.text
                    logprobs[self.index[delta.request_id]] += delta.logprobs
                    self.last[delta.request_id] = delta
        except EngineFailedError as error:
            await _failed(error)(scope, receive, send)
            return
        if len(self.last) < len(self.index) or any(d.finish_reason is None for d in self.last.values()):
            return  # the client is gone
        choices = []
        for request_id, index in self.index.items():
            reason = self.last[request_id].finish_reason
            assert reason is not None
            choice = self.choice(index, texts[index], logprobs[index], reason)
            choices.append(self._with_attention(choice, request_id))
        body = dump({**self.head, "choices": choices, "usage": self._usage()})
        await Response(body, media_type="application/json")(scope, receive, send)
        self._delivered()

    async def _events(self, send: Send) -> None:
        """Sends server-sent events; waits for the first deltas before the status, so that an early error sets it."""
        try:
            news = await self.stream.next()
        except EngineFailedError as error:
            await _send_response(_failed(error), send)
            return
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            while news:
                await self._note(news)
                data = b"".join(self._event(delta) for delta in news)
                if self.stream.finished:
                    break
                if data:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                    if self.interval_s:
                        await asyncio.sleep(self.interval_s)
                news = await self.stream.next()
            else:
                return  # the client is gone
        except EngineFailedError as error:
            data = event(_failure(error).body())
            await send({"type": "http.response.body", "body": data, "more_body": False})
            return
        # The last text and the end are one message, because every message costs a hop through Ray's proxy.
        await send({"type": "http.response.body", "body": data + self._end(), "more_body": False})
        self._delivered()

    def _end(self) -> bytes:
        if self.request.stream_options is None or not self.request.stream_options.include_usage:
            return b"data: [DONE]\n\n"
        return event({**self.head, "choices": [], "usage": self._usage()}) + b"data: [DONE]\n\n"

    def _event(self, delta: Delta) -> bytes:
        self.last[delta.request_id] = delta
        if not delta.text and not delta.logprobs and delta.finish_reason is None:
            return b""
        choices = self.news(self.index[delta.request_id], delta)
        if delta.finish_reason is not None:
            choices[-1] = self._with_attention(choices[-1], delta.request_id)
        return b"".join(event({**self.head, "choices": [choice]}) for choice in choices)

    @property
    def completion_tokens(self) -> int:
        """Tokens of all choices."""
        return sum(delta.tokens for delta in self.last.values())

    def _usage(self) -> dict[str, Any]:
        """The `usage` object: token counts, and the memory of all choices' states when they finished.

        kv_bytes, kv_bytes_full: bytes of the states as kept, and as a full cache would keep them. Both are for `held`
        tokens, because the model never reads the last one. not_compressed: why the cache did not compress, or None.
        cached_tokens: of the first choice of each prompt, as prompt_tokens; not_cached: why there cannot be any.
        """
        deltas = list(self.last.values())
        completion = self.completion_tokens
        kv_bytes = sum(delta.kv_bytes for delta in deltas)
        held = sum(delta.prompt_tokens + delta.tokens - 1 for delta in deltas)
        reasons = dict.fromkeys(delta.not_compressed for delta in deltas if delta.not_compressed)
        unshared = dict.fromkeys(delta.not_cached for delta in deltas if delta.not_cached)
        of_prompts = set(list(self.index)[:: self.request.n or 1])
        firsts = [delta for request_id, delta in self.last.items() if request_id in of_prompts]
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": sum(delta.cached_tokens for delta in firsts)},
            "completion_tokens_details": {
                "accepted_prediction_tokens": sum(delta.accepted_tokens for delta in deltas),
                "rejected_prediction_tokens": sum(delta.rejected_tokens for delta in deltas),
            },
            "attnzoo": {
                "policy": deltas[0].policy if deltas else "full",
                "kv_bytes": kv_bytes,
                "kv_bytes_full": sum(delta.kv_bytes_full for delta in deltas),
                "kv_bytes_per_token": round(kv_bytes / max(held, 1), 3),
                "kept_tokens": sum(delta.kept_tokens for delta in deltas),
                "not_compressed": "; ".join(reasons) or None,
                "not_cached": "; ".join(unshared) or None,
                "ttft_ms": round(1000 * min((delta.ttft_s for delta in deltas), default=0.0), 3),
            },
        }


def _failure(error: EngineFailedError) -> ApiError:
    """The error for the client: the reason if its own request failed; if the engine failed or ends, only that."""
    if isinstance(error, RequestFailedError) and error.param is not None:
        return ApiError(400, str(error), param=error.param)
    if isinstance(error, RequestFailedError):
        return ApiError(500, str(error), code="request_failed")
    if isinstance(error.__cause__, EngineUnavailableError):
        return ApiError(503, str(error), code="shutting_down", headers={"retry-after": "5"})
    return ApiError(500, "the engine failed while it worked on this request", code="engine_failed")


def _failed(error: EngineFailedError) -> Response:
    failure = _failure(error)
    return Response(dump(failure.body()), failure.status, failure.headers, media_type="application/json")


async def _send_response(response: Response, send: Send) -> None:
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body})
