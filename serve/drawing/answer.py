"""Sends pictures, whole or step by step, and ends the work when the client is gone."""

import asyncio
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.drawing.protocol import PictureRequest
from serve.drawing.studio import Artist, Draft, Painted, Studio
from serve.front.guard import error_response
from serve.openai.errors import ApiError, dump, event
from serve.workplace import Deadline

EVENTS = "text/event-stream; charset=utf-8"
LAST = b"data: [DONE]\n\n"


def card(artist: Artist, studio: Studio, created: int) -> dict[str, Any]:
    """The model in the list of models."""
    config = artist.trained.model.config
    return {
        "id": artist.name,
        "object": "model",
        "created": created,
        "owned_by": "attnzoo",
        "kind": "diffusion",
        "version": artist.version,
        "weights_digest": artist.weights_digest,
        "size": artist.size,
        "composes": artist.cannot_compose is None,
        "max_words": config.words,
        "words": list(artist.trained.words.words),
        "max_drawn": studio.config.max_drawn,
        "max_steps": studio.config.max_draw_steps,
        "max_pixels": studio.config.max_draw_pixels,
    }


def reply(artist: Artist, drafts: Sequence[Draft], found: Painted) -> dict[str, Any]:
    """The whole reply. Pictures without a seed have none in it."""
    return {
        "object": "image.list",
        "created": int(time.time()),
        "model": artist.name,
        "size": artist.size,
        "output_format": "png",
        "seconds": found.seconds,
        "forwards": found.forwards,
        "data": [
            {"b64_json": picture, **({} if draft.seed is None else {"seed": draft.seed})}
            for draft, picture in zip(drafts, found.pictures, strict=True)
        ],
    }


class PicturesAnswer(Response):
    """The answer to a request. held: what ends with it."""

    def __init__(
        self, studio: Studio, request: PictureRequest, drafts: Sequence[Draft], deadline: Deadline, held: ExitStack
    ) -> None:
        super().__init__()
        self._studio, self._request, self._drafts = studio, request, drafts
        self._deadline, self._held, self._left = deadline, held, threading.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            sending = asyncio.create_task(self._stream(send) if self._request.stream else self._whole(scope, send))
            gone = asyncio.create_task(_gone(receive))
            try:
                await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
            finally:
                self._left.set()
                gone.cancel()
                if not sending.done():
                    sending.cancel()
            with suppress(asyncio.CancelledError, OSError):  # the client has disconnected
                await sending

    async def _paint(self, tell: Any) -> dict[str, Any]:
        """The whole reply. Raises ApiError."""
        arguments = (self._drafts, self._request.preview_every, self._deadline, self._left, tell)
        found = await self._studio.work(self._deadline, self._studio.paint, *arguments)
        return reply(self._studio.artist, self._drafts, found)

    async def _whole(self, scope: Scope, send: Send) -> None:
        try:
            content = dump(await self._paint(lambda _: None))
            response = Response(content, media_type="application/json")
        except ApiError as error:
            response = error_response(error)
        await response(scope, _nothing, send)

    async def _stream(self, send: Send) -> None:
        """Events as they come. A failure on the way is an event of its own, and the last one."""
        headers = [(b"content-type", EVENTS.encode()), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        loop, news = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any] | None]()
        painting = asyncio.create_task(self._paint(lambda told: loop.call_soon_threadsafe(news.put_nowait, told)))
        painting.add_done_callback(lambda _: news.put_nowait(None))
        try:
            while (told := await news.get()) is not None:
                await send({"type": "http.response.body", "body": event(told), "more_body": True})
            try:
                last = event(await painting) + LAST
            except ApiError as error:
                last = event(error.body())
            await send({"type": "http.response.body", "body": last, "more_body": False})
        finally:
            painting.cancel()


async def _gone(receive: Receive) -> None:
    """Until the client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing() -> Any:
    raise RuntimeError("nothing more is read")
