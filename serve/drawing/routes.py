"""POST /v1/images/generations and /v1/images/compose."""

from collections.abc import Callable
from contextlib import ExitStack

from fastapi import FastAPI, Request, Response

from serve.drawing.answer import PicturesAnswer
from serve.drawing.drafts import composition_of, drafts_of
from serve.drawing.protocol import PictureRequest, parse_compose, parse_image
from serve.drawing.studio import Draft, Studio
from serve.openai.encoding import in_data_thread

GENERATIONS, COMPOSE = "/v1/images/generations", "/v1/images/compose"


def add_drawing(app: FastAPI, studio: Studio) -> None:
    """Adds the paths to an application."""

    @app.post(GENERATIONS)
    async def generations(request: Request) -> Response:
        return await answered(await request.body(), lambda body: _read_image(body, studio))

    @app.post(COMPOSE)
    async def composed(request: Request) -> Response:
        return await answered(await request.body(), lambda body: _read_composition(body, studio))

    async def answered(body: bytes, read: Callable[[bytes], tuple[PictureRequest, list[Draft]]]) -> Response:
        with ExitStack() as held:
            deadline = held.enter_context(studio.admitted())
            request, drafts = await in_data_thread(read, body)
            return PicturesAnswer(studio, request, drafts, deadline, held.pop_all())


def _read_image(body: bytes, studio: Studio) -> tuple[PictureRequest, list[Draft]]:
    request = parse_image(body)
    studio.check_name(request.model)
    return request, drafts_of(request, studio)


def _read_composition(body: bytes, studio: Studio) -> tuple[PictureRequest, list[Draft]]:
    request = parse_compose(body)
    studio.check_name(request.model)
    return request, composition_of(request, studio)
