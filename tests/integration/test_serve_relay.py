"""Events of streamed answers beside Ray: a proxy and a replica in one process, and between them what Ray would do."""

import asyncio
import os
import random
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from serve.front.guard import HeaderFilter
from serve.front.limits import Limits
from serve.front.retry import Retry
from serve.relay import frames, receiver, sender
from serve.relay.frames import HEADER, MOST, Frames
from serve.relay.frames import frames as written
from serve.relay.receiver import Relay
from serve.relay.sender import Outlet
from tests.helpers.http_server import running

pytestmark = pytest.mark.skipif(not frames.SUPPORTED, reason="needs Linux's abstract sockets")

EVENTS = {"content-type": "text/event-stream; charset=utf-8"}
Steps = Callable[[Callable[..., Awaitable[None]]], Awaitable[None]]


class Ray:
    """What is between proxy and replica: passes everything on, and keeps what passes."""

    def __init__(self, replica: Any) -> None:
        self.replica, self.bodies, self.asked = replica, [], []

    async def __call__(self, scope, receive, send):
        self.asked.append([name for name, _ in scope["headers"]])

        async def passed(message):
            self.bodies.append(message.get("body"))
            await send(message)

        await self.replica(scope, receive, passed)


def application(steps: Steps, headers: dict[str, str] = EVENTS) -> Any:
    """Starts an answer and leaves the rest to `steps`, which get a function that sends some of its body."""

    async def app(scope, receive, send):
        assert all(name != HEADER for name, _ in scope["headers"]), "the application sees what is between proxy and it"
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})

        async def body(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        await steps(body)

    return app


async def counted(body: Callable[..., Awaitable[None]]) -> None:
    for number in range(20):
        await body(b"data: %d\n\n" % number)
        await asyncio.sleep(0)
    await body(b"data: [DONE]\n\n", False)


WHOLE = b"".join(b"data: %d\n\n" % number for number in range(20)) + b"data: [DONE]\n\n"


async def ask(
    app: Any, headers: tuple[tuple[bytes, bytes], ...] = (), path: str = "/v1/completions"
) -> list[dict[str, Any]]:
    """The messages that a client's connection gets."""
    found: list[dict[str, Any]] = []

    async def send(message):
        found.append(message)

    async def receive():
        await asyncio.sleep(3600)

    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(),
        "query_string": b"", "headers": [(b"host", b"localhost"), *headers],
    }  # fmt: skip
    await asyncio.wait_for(app(scope, receive, send), 20)
    return found


def text_of(messages: list[dict[str, Any]]) -> bytes:
    """The body, after a check that it is one answer from start to end."""
    kinds = [message["type"] for message in messages]
    assert kinds == ["http.response.start", *["http.response.body"] * (len(kinds) - 1)]
    assert [message["more_body"] for message in messages[1:]] == [True] * (len(kinds) - 2) + [False]
    assert all(name != HEADER for name, _ in messages[0]["headers"]), "a client sees what is between proxy and replica"
    return b"".join(message["body"] for message in messages[1:])


def test_events_come_beside_ray_and_the_end_through_it():
    ray = Ray(Outlet(application(counted)))
    assert text_of(asyncio.run(ask(Relay(ray)))) == WHOLE
    assert ray.bodies == [None, b""], "start and end, and no event"


def test_answers_without_events_go_through_ray():
    ray = Ray(Outlet(application(counted, {"content-type": "application/json"})))
    assert text_of(asyncio.run(ask(Relay(ray)))) == WHOLE
    assert len(ray.bodies) == 22


def test_many_answers_at_once_each_get_their_own():
    chance = random.Random(0)
    sizes = (1, 30, 4000, 200_000)
    texts = [[chance.randbytes(chance.choice(sizes)) for _ in range(12)] for _ in range(40)]

    async def app(scope, receive, send):
        async def said(body):
            for text in texts[int(scope["path"])]:
                await body(text)
                await asyncio.sleep(chance.choice([0, 0, 0.002]))
            await body(b"", False)

        await application(said)(scope, receive, send)

    async def all_of_them() -> list[list[dict[str, Any]]]:
        relay = Relay(Ray(Outlet(app)))
        return await asyncio.gather(*(ask(relay, path=str(index)) for index in range(40)))

    for found, expected in zip(asyncio.run(all_of_them()), texts, strict=True):
        assert text_of(found) == b"".join(expected)


def test_a_client_that_reads_slowly_holds_up_nobody():
    async def both() -> bytes:
        relay = Relay(Ray(Outlet(application(counted))))
        held = asyncio.Event()

        async def slow(message):
            await held.wait()

        scope = {"type": "http", "headers": []}
        waiting = asyncio.ensure_future(relay(scope, asyncio.Event().wait, slow))
        await asyncio.sleep(0.05)
        found = text_of(await ask(relay))
        assert not waiting.done()
        held.set()
        await asyncio.wait_for(waiting, 5)
        return found

    assert asyncio.run(both()) == WHOLE


def test_events_of_one_turn_leave_in_one_piece(monkeypatch):
    pieces: list[int] = []
    whole = Frames.feed
    monkeypatch.setattr(Frames, "feed", lambda self, data: (pieces.append(len(data)), whole(self, data))[1])

    async def together() -> None:
        go = asyncio.Event()

        async def said(body):
            await body(b"first")
            await go.wait()
            await body(b"second")
            await asyncio.sleep(0.1)
            await body(b"", False)

        relay = Relay(Ray(Outlet(application(said))))
        answers = [asyncio.ensure_future(ask(relay)) for _ in range(16)]
        await asyncio.sleep(0.2)
        pieces.clear()
        go.set()
        await asyncio.sleep(0.05)
        assert pieces == [16 * len(written(0, b"second"))]
        await asyncio.gather(*answers)

    asyncio.run(together())


@pytest.mark.parametrize("value", [b"1", b"../../etc 1", b"f" * 32 + b" 1", b"f" * 32 + b" " + b"9" * 30, b""])
def test_what_a_client_says_of_sockets_is_nothing(value):
    """The guard of the proxy takes the header away; without that guard it names no socket that there is."""
    ray = Ray(Outlet(application(counted)))
    guarded = HeaderFilter(Relay(ray), limits=Limits())
    assert text_of(asyncio.run(ask(guarded, ((HEADER, value), (b"X_Attnzoo-Relay", value))))) == WHOLE
    assert ray.asked[0].count(HEADER) == 1
    alone = Ray(Outlet(application(counted)))
    assert text_of(asyncio.run(ask(alone, ((HEADER, value),)))) == WHOLE
    assert len(alone.bodies) == 22


@pytest.mark.parametrize("end", ["proxy", "replica"])
def test_processes_of_another_user_are_not_talked_to(monkeypatch, end):
    """Either end refuses by itself. A replica's events then go through Ray; a proxy finds no answer, and says so."""
    monkeypatch.setattr(receiver if end == "proxy" else sender, "is_own", lambda connection: False)
    monkeypatch.setattr(receiver, "LATE_S", 0.2)
    ray = Ray(Outlet(application(counted)))
    found = asyncio.run(ask(Retry(Relay(ray), lambda: 1)))
    if end == "replica":
        assert text_of(found) == WHOLE
        assert len(ray.bodies) == 22
    else:
        assert found[0]["status"] == 503


def test_the_owner_of_the_other_end_is_known():
    import socket

    one, other = socket.socketpair()
    with one, other:
        assert frames.is_own(one)
        if os.getuid() == 0:
            os.seteuid(1)
            try:
                third, fourth = socket.socketpair()
            finally:
                os.seteuid(0)
            with third, fourth:
                assert not frames.is_own(third)


def test_where_sockets_are_missing_events_go_through_ray(monkeypatch):
    monkeypatch.setattr(receiver, "SUPPORTED", False)
    ray = Ray(Outlet(application(counted)))
    assert text_of(asyncio.run(ask(Relay(ray)))) == WHOLE
    assert len(ray.bodies) == 22


def test_a_stream_whose_replica_dies_ends_with_an_error_event():
    """Its socket is closed by the system, and Ray ends the answer without an end."""

    async def dies() -> list[dict[str, Any]]:
        async def said(body):
            await body(b"data: 1\n\n")
            await asyncio.sleep(0.05)
            for line in outlet._lines.values():
                line._transport.abort()
            raise asyncio.CancelledError

        outlet = Outlet(application(said))

        async def ray(scope, receive, send):
            try:
                await outlet(scope, receive, send)
            except asyncio.CancelledError:
                return

        return await ask(Retry(Relay(ray), lambda: 1))

    found = asyncio.run(dies())
    assert b"".join(message.get("body", b"") for message in found).startswith(b"data: 1\n\ndata: ")
    assert b"engine_failed" in found[-1]["body"]


def test_an_answer_is_cut_when_its_line_is_lost_though_ray_goes_on():
    async def lost() -> list[dict[str, Any]]:
        async def said(body):
            await body(b"data: 1\n\n")
            await asyncio.sleep(0.05)
            for line in outlet._lines.values():
                line._transport.abort()
            await asyncio.sleep(0.05)
            await body(b"data: [DONE]\n\n", False)

        outlet = Outlet(application(said))
        return await ask(Retry(Relay(Ray(outlet)), lambda: 1))

    found = asyncio.run(lost())
    assert b"engine_failed" in found[-1]["body"]
    assert b"[DONE]" not in b"".join(message.get("body", b"") for message in found)


def test_the_next_answer_finds_a_new_line():
    async def twice() -> list[bytes]:
        outlet = Outlet(application(counted))
        relay = Relay(Ray(outlet))
        first = text_of(await ask(relay))
        for line in outlet._lines.values():
            line._transport.abort()
        await asyncio.sleep(0.05)
        return [first, text_of(await ask(relay))]

    assert asyncio.run(twice()) == [WHOLE, WHOLE]


def test_frames_begin_and_end_anywhere():
    chance = random.Random(0)
    sent = [(chance.getrandbits(60), chance.randbytes(chance.choice([0, 1, 11, 12, 13, 5000]))) for _ in range(300)]
    stream = b"".join(written(number, data) for number, data in sent)
    for longest in (1, 7, 12, 100, len(stream)):
        reader, found, at = Frames(), [], 0
        while at < len(stream):
            step = chance.randint(1, longest)
            found += reader.feed(stream[at : at + step])
            at += step
        assert found == sent


def test_long_bodies_are_cut_and_longer_frames_refused():
    chance = random.Random(1)
    body = chance.randbytes(2 * MOST + 5)
    found = list(Frames().feed(written(7, body)))
    assert [len(data) for _, data in found] == [MOST, MOST, 5]
    assert b"".join(data for _, data in found) == body
    with pytest.raises(ValueError, match="is the most"):
        list(Frames().feed((7).to_bytes(8, "big") + (MOST + 1).to_bytes(4, "big")))


def test_what_no_replica_sends_ends_its_connection_and_nobodys_answer():
    """Numbers that were not given out reach nothing."""

    async def attacked() -> tuple[bytes, bytes]:
        begun, go = asyncio.Event(), asyncio.Event()

        async def said(body):
            await body(b"data: 1\n\n")
            begun.set()
            await go.wait()
            await body(b"data: [DONE]\n\n", False)

        relay = Relay(Ray(Outlet(application(said))))
        answer = asyncio.ensure_future(ask(relay))
        await begun.wait()
        reader, writer = await asyncio.open_unix_connection(frames.address(relay._name))
        writer.write(b"".join(written(number, data) for number in range(5000) for data in (b"evil", b"")))
        writer.write(b"\xff" * 64)
        rest = await asyncio.wait_for(reader.read(), 5)
        writer.close()
        go.set()
        return rest, text_of(await answer)

    assert asyncio.run(attacked()) == (b"", b"data: 1\n\ndata: [DONE]\n\n")


def test_a_real_stream_is_the_same_with_and_without_it():
    body = {"model": "small", "prompt": "Hello", "max_tokens": 12, "seed": 1, "temperature": 0, "stream": True}
    with running() as (url, _):
        answer = httpx.post(f"{url}/v1/completions", json=body, headers={HEADER.decode(): "f" * 32 + " 1"}, timeout=30)
    assert answer.text.endswith("data: [DONE]\n\n")
    assert HEADER.decode() not in answer.headers
