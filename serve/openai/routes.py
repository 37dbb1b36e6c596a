"""The HTTP application, for Ray Serve or plain uvicorn: of a language model, clinical ones, a diffusion model, or
several of these."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

import attnzoo
from serve.async_engine import AsyncEngine
from serve.clinical import page as patients
from serve.clinical.clinic import Clinic
from serve.clinical.describe import card_of
from serve.clinical.routes import add_predictions
from serve.config import ServeConfig
from serve.drawing import page as vision
from serve.drawing.answer import card as drawing_card
from serve.drawing.routes import add_drawing
from serve.drawing.studio import Studio
from serve.front.guard import Counted, error_response, guard
from serve.loading import in_effect
from serve.maps import MapStore
from serve.metrics import CONTENT_TYPE, ServerMetrics
from serve.openai.answer import no_model
from serve.openai.attention import Desk
from serve.openai.chat import ChatAnswer, prepare_chat
from serve.openai.completions import CompletionAnswer, prepare
from serve.openai.document import document
from serve.openai.encoding import in_thread
from serve.openai.errors import ApiError, dump, short_name
from serve.openai.protocol import parse_completion
from serve.openai.protocol_chat import parse_chat
from serve.openai.readings import PATH
from serve.openai.tokens import detokenize, parse_detokenize, parse_tokenize, tokenize, tokenizer_info
from serve.pages import add_page
from serve.relay.sender import Outlet
from serve.workplace import Workplace

READ = ["GET", "HEAD"]


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(dump(value), status, headers, media_type="application/json")


def build_app(
    engine: AsyncEngine | None, config: ServeConfig, clinic: Clinic | None = None, studio: Studio | None = None
) -> FastAPI:
    """The application for a running engine, for clinical models, for a diffusion model, or for several of these. Its
    shutdown drains and stops them."""
    parts = [part for part in (engine, clinic, studio) if part is not None]

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.gather(*(part.drain(config.drain_timeout_s) for part in parts))
        for part in parts:
            part.stop()

    metrics = ServerMetrics() if engine is None else engine.engine.metrics
    counted = Middleware(Counted, answered=metrics.answered)
    middleware = [Middleware(Outlet), counted, *guard(config.front_limits)]
    app = FastAPI(title="attnzoo", lifespan=lifespan, docs_url=None, redoc_url=None, middleware=middleware)
    _add_error_handlers(app)
    modalities = None if engine is None else engine.engine.modalities
    described = document("attnzoo", modalities, clinical=clinic is not None, drawing=studio is not None)
    app.openapi = lambda: described  # type: ignore[method-assign]
    cards, maps = [], None
    if engine is not None:
        desk = Desk.of(engine, config)
        maps = desk.maps
        cards.append(_card(engine, config, desk))
        _add_generation(app, engine, config, desk)
        _add_tokens(app, engine, config)
        _add_maps(app, desk.maps)
    if clinic is not None:
        clinic.ended, app.state.clinic = metrics.predicted, clinic
        cards += [card_of(model, int(time.time())) for model in clinic.models]
        add_predictions(app, clinic)
        add_page(app, "/patients", patients.DIRECTORY)
    if studio is not None:
        studio.ended, app.state.studio = metrics.drawn, studio
        cards.append(drawing_card(studio.artist, studio, int(time.time())))
        add_drawing(app, studio)
        add_page(app, "/vision", patients.DIRECTORY, vision.DIRECTORY)
    _add_information(app, engine, (clinic, studio), {card["id"]: card for card in cards})
    _add_metrics(app, engine, metrics, maps)
    return app


def _add_generation(app: FastAPI, engine: AsyncEngine, config: ServeConfig, desk: Desk) -> None:
    interval_s = config.stream_interval_ms / 1000

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await request.body()
        completion = await in_thread(len(body), parse_completion, body)
        work = await prepare(completion, engine, config, desk)
        return CompletionAnswer(completion, engine, work, interval_s=interval_s)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = await request.body()
        chat = await in_thread(len(body), parse_chat, body)
        work = await prepare_chat(chat, engine, config, desk)
        return ChatAnswer(chat, engine, work, interval_s=interval_s)


def _add_tokens(app: FastAPI, engine: AsyncEngine, config: ServeConfig) -> None:
    @app.post("/tokenize")
    async def tokens_of(request: Request) -> Response:
        body = await request.body()
        return json_response(await tokenize(await in_thread(len(body), parse_tokenize, body), engine, config))

    @app.post("/detokenize")
    async def text_of(request: Request) -> Response:
        body = await request.body()
        return json_response(await detokenize(await in_thread(len(body), parse_detokenize, body), engine, config))

    @app.api_route("/tokenizer_info", methods=READ)
    async def info() -> Response:
        return json_response(tokenizer_info(engine))


def _add_maps(app: FastAPI, maps: MapStore) -> None:
    @app.api_route(PATH + "/{map_id}", methods=READ)
    async def attention_map(map_id: str) -> Response:
        data = maps.get(map_id)
        if data is None:
            message = f"there is no attention map {short_name(map_id)!r}; a map is kept for {maps.ttl_s:g} s"
            raise ApiError(404, message, param="map_id", code="attention_map_not_found")
        headers = {"content-disposition": 'attachment; filename="attention.npy"', "cache-control": "no-store"}
        return Response(data, headers=headers, media_type="application/octet-stream")


def _add_error_handlers(app: FastAPI) -> None:
    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
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


def _card(engine: AsyncEngine, config: ServeConfig, desk: Desk) -> dict[str, Any]:
    """The language model in the list of models."""
    return {
        "id": config.served_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "attnzoo",
        "kind": "language",
        "max_model_len": engine.engine.max_model_len,
        **in_effect(engine.engine.model, config),
        "content": {kind: modality.card() for kind, modality in engine.engine.modalities.items()},
        "attention": desk.card(),
    }


def _add_information(
    app: FastAPI,
    engine: AsyncEngine | None,
    others: tuple[Workplace | None, ...],
    cards: dict[str, dict[str, Any]],
) -> None:
    @app.api_route("/health", methods=READ)
    @app.api_route("/ready", methods=READ)
    async def health() -> Response:
        problem = None if engine is None else engine.health()
        draining = any(part is not None and part.draining for part in (engine, *others))
        if problem is not None or draining:
            raise ApiError(503, problem or "draining", code="unhealthy")
        return json_response({"status": "ok"})

    @app.api_route("/version", methods=READ)
    async def version() -> Response:
        return json_response({"version": attnzoo.__version__})

    @app.api_route("/v1/models", methods=READ)
    async def models() -> Response:
        return json_response({"object": "list", "data": list(cards.values())})

    @app.api_route("/v1/models/{model_id:path}", methods=READ)
    async def model(model_id: str) -> Response:
        if model_id not in cards:
            raise no_model(model_id, *cards)
        return json_response(cards[model_id])


def _add_metrics(app: FastAPI, engine: AsyncEngine | None, metrics: ServerMetrics, maps: MapStore | None) -> None:
    @app.api_route("/metrics", methods=READ)
    async def numbers() -> Response:
        if maps is not None:
            maps.sweep()
            metrics.maps(maps.nbytes)
        content = metrics.render() if engine is None else engine.engine.render_metrics()
        return Response(content, media_type=CONTENT_TYPE)
