"""The HTTP application: runs under uvicorn as it is, and inside Ray Serve."""

import hmac
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.async_engine import AsyncEngine
from serve.config import ServeConfig
from serve.metrics import CONTENT_TYPE, REFUSALS
from serve.openai.answer import check_model
from serve.openai.aside import aside
from serve.openai.chat import ChatAnswer, prepare_chat
from serve.openai.completions import CompletionAnswer, prepare
from serve.openai.document import document
from serve.openai.errors import ApiError, dump
from serve.openai.protocol import parse_completion
from serve.openai.protocol_chat import parse_chat

OPEN_PATHS = ("/health",)
"""Paths that need no API key."""


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(dump(value), status, headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
    """An error in OpenAI's shape."""
    return json_response(error.body(), error.status, error.headers)


class ApiKeyMiddleware:
    """Refuses requests without `Authorization: Bearer <key>`, whatever their path, but for `OPEN_PATHS`."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self.expected = app, b"Bearer " + key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = [value for name, value in scope["headers"] if name == b"authorization"]
            if len(given) != 1 or not hmac.compare_digest(given[0], self.expected):
                error = ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
                await error_response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def read_api_key(config: ServeConfig) -> str | None:
    """The key in the environment variable that the configuration names. Raises ValueError when it is not set."""
    if config.api_key_env is None:
        return None
    key = os.environ.get(config.api_key_env, "")
    if not key:
        raise ValueError(f"api_key_env={config.api_key_env!r}: set that environment variable to the API key")
    return key


async def read_body(request: Request, limit: int) -> bytes:
    """The body. Raises ApiError 413 as soon as it is larger than `limit` bytes."""
    error = ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise error
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise error
        parts.append(part)
    return b"".join(parts)


def build_app(engine: AsyncEngine, config: ServeConfig) -> FastAPI:
    """The application around a running engine. Its shutdown drains and stops the engine."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await engine.drain(config.drain_timeout_s)
        engine.stop()

    app = FastAPI(title="attnzoo", lifespan=lifespan, docs_url=None, redoc_url=None)
    key = read_api_key(config)
    if key is not None:
        app.add_middleware(ApiKeyMiddleware, key=key)
    _add_error_handlers(app, engine)
    app.openapi = lambda: document("attnzoo")  # type: ignore[method-assign]
    _add_information(app, engine, config)

    _add_generation(app, engine, config)
    return app


def _add_generation(app: FastAPI, engine: AsyncEngine, config: ServeConfig) -> None:
    interval_s = config.stream_interval_ms / 1000

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await read_body(request, config.max_body_bytes)
        completion = await aside(len(body), parse_completion, body)
        work = await prepare(completion, engine, config)
        return CompletionAnswer(completion, engine, work, interval_s=interval_s)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = await read_body(request, config.max_body_bytes)
        chat = await aside(len(body), parse_chat, body)
        work = await prepare_chat(chat, engine, config)
        return ChatAnswer(chat, engine, work, interval_s=interval_s)


def _add_error_handlers(app: FastAPI, engine: AsyncEngine) -> None:
    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        if error.code in REFUSALS:
            engine.engine.metrics.refused(error.code)
        return error_response(error)

    async def no_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        messages = {
            404: f"no such path: {request.url.path}",
            405: f"{request.method} is not allowed for {request.url.path}",
        }
        message = messages.get(error.status_code, str(error.detail))
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        return error_response(ApiError(error.status_code, message, code=code, headers=dict(error.headers or {})))

    async def broken(_: Request, error: Exception) -> Response:
        return error_response(ApiError(500, "internal error", code=type(error).__name__))

    app.add_exception_handler(ApiError, refused)
    app.add_exception_handler(HTTPException, no_route)
    app.add_exception_handler(Exception, broken)


def _add_information(app: FastAPI, engine: AsyncEngine, config: ServeConfig) -> None:
    card = {"id": config.served_name, "object": "model", "created": int(time.time()), "owned_by": "attnzoo"}
    card["max_model_len"] = engine.engine.max_model_len

    @app.get("/health")
    async def health() -> Response:
        problem = engine.health() or ("draining" if engine.draining else None)
        if problem is not None:
            raise ApiError(503, problem, code="unhealthy")
        return json_response({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(engine.engine.render_metrics(), media_type=CONTENT_TYPE)

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [card]})

    @app.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> Response:
        check_model(model_id, config)
        return json_response(card)
