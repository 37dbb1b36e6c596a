"""Runs an `Engine` in a thread, and streams its results to asyncio.

Requests and aborts go into an inbox, which the thread empties before every step. The deltas of a step come back in one
callback on the event loop. The event loop never waits for the model, and the model never waits for a client: deltas
that a slow client has not read stay in its stream, at most max_tokens of them.
"""

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from attnzoo.attention.edits import EditPlan
from attnzoo.kvcache.choice import CacheChoice
from serve.engine import Engine
from serve.faults import DeviceError, log, message
from serve.request import USUAL, Delta, SamplingParams, Urgency
from serve.scheduling import QueueFullError

MAX_FAULTS = 3
"""The engine ends after so many failed steps in a row."""

FLUSH_S = 2.0
"""Seconds that a shutdown waits for the error messages of requests that it has ended."""


class EngineUnavailableError(Exception):
    """The engine takes no requests, because it is shutting down or has failed."""


class EngineFailedError(Exception):
    """The engine failed while it worked on this request."""


class RequestFailedError(EngineFailedError):
    """This request failed, and the engine goes on. The message is for the request's owner only. param: the field that
    is at fault, if the request is."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Stream:
    """The deltas of one `submit`. Read them with `next`, and always `close`, which aborts unfinished requests."""

    def __init__(self, owner: "AsyncEngine", request_ids: list[str]) -> None:
        self.request_ids = request_ids
        self._owner = owner
        self._unfinished = set(request_ids)
        self._news: list[Delta] = []
        self._failure: BaseException | None = None
        self._closed = False
        self._wake = asyncio.Event()

    @property
    def finished(self) -> bool:
        """Whether `next` will return nothing more: every request has ended, and every delta has been read."""
        return self._closed or not (self._unfinished or self._news)

    async def next(self) -> list[Delta]:
        """Waits for deltas and returns all that came since the last call; an empty list at the end and after `close`.

        Raises RequestFailedError if one of the requests has failed, EngineFailedError if the engine has.
        """
        while not self._news and not self.finished and self._failure is None:
            self._wake.clear()
            await self._wake.wait()
        if self._news and not self._closed:
            news, self._news = self._news, []
            return news
        if isinstance(self._failure, RequestFailedError) and not self._closed:
            raise self._failure
        if self._failure is not None and not self.finished:
            raise EngineFailedError(str(self._failure)) from self._failure
        return []

    def close(self) -> None:
        """Aborts unfinished requests; their slots are free before the next step. May be called twice."""
        if not self._closed:
            self._closed = True
            self._owner._abandon(self._unfinished)
            self._wake.set()

    def _put(self, delta: Delta) -> None:
        if delta.error is not None:
            self._fail(RequestFailedError(delta.error, delta.param))
            return  # the request never counts as finished, so that no client takes its partial text for an answer
        self._news.append(delta)
        if delta.finish_reason is not None:
            self._unfinished.discard(delta.request_id)
        self._wake.set()

    def _fail(self, failure: BaseException) -> None:
        self._failure = failure
        self._wake.set()


class AsyncEngine:
    """Owns an `Engine` and its thread. Call the methods from one event loop at a time."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.draining = False
        self._limit = engine.config.max_num_seqs + engine.config.max_queue
        self._streams: dict[str, Stream] = {}
        self._ids = itertools.count()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inbox: list[Callable[[], object]] = []
        self._condition = threading.Condition()
        self._stopping = False
        self._failure: BaseException | None = None
        self._step_started: float | None = None
        self._thread = threading.Thread(target=self._run, name="attnzoo-engine", daemon=True)
        self._thread.start()

    def health(self) -> str | None:
        """None if the engine works, else a message. Also fails all requests when a step exceeds step_timeout_s."""
        started, limit = self._step_started, self.engine.config.step_timeout_s
        if self._failure is None and started is not None and time.perf_counter() - started > limit:
            self._fail_all(TimeoutError(f"a step took longer than step_timeout_s={limit}"))
        if self._failure is not None:
            return f"the engine failed: {type(self._failure).__name__}"
        return None if self._thread.is_alive() else "the engine has stopped"

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        cache: CacheChoice | None = None,
        plans: Sequence[EditPlan | None] | None = None,
        urgency: Urgency = USUAL,
    ) -> Stream:
        """Queues all prompts or none of them, with the same `cache` and urgency. The stream's `request_ids` are in
        their order. plans: what each reads and edits of attention.

        Raises the errors of `Engine.check`; QueueFullError; EngineUnavailableError; RuntimeError outside an event loop,
        and while requests of another event loop are open.
        """
        if self.draining or self.health() is not None:
            raise EngineUnavailableError(self.health() or "the server is shutting down")
        plans = plans or [None] * len(prompts)
        for prompt, param, plan in zip(prompts, params, plans, strict=True):
            self.engine.check(prompt, param, cache, plan is not None)
        if len(self._streams) + len(prompts) > self._limit:
            raise QueueFullError(f"{len(self._streams)} requests are running or waiting, the limit is {self._limit}")
        self._enter(asyncio.get_running_loop())
        arrived = time.perf_counter()
        stream = Stream(self, [f"r{next(self._ids)}" for _ in prompts])
        commands: list[Callable[[], object]] = []
        for request_id, prompt, param, plan in zip(stream.request_ids, prompts, params, plans, strict=True):
            self._streams[request_id] = stream
            commands.append(partial(self._admit, request_id, prompt, param, arrived, cache, plan, urgency))
        self._send(commands)
        return stream

    def _enter(self, loop: asyncio.AbstractEventLoop) -> None:
        """Makes `loop` the event loop that receives deltas. Aborts the requests of an earlier loop that has ended."""
        if loop is self._loop:
            return
        if self._streams and self._loop is not None and not self._loop.is_closed():
            raise RuntimeError(
                "requests of another event loop are still open: submit from that loop, or make an AsyncEngine for each"
            )
        self._abandon(set(self._streams))
        self._loop = loop

    async def drain(self, timeout_s: float) -> bool:
        """Refuses new requests and waits for running ones. Requests left after `timeout_s` seconds end with an error,
        which has `FLUSH_S` seconds to reach the clients; then the result is False."""
        self.draining = True
        deadline = time.perf_counter() + timeout_s
        while self._streams and self._failure is None and time.perf_counter() < deadline:
            await asyncio.sleep(0.02)
        late = set(self._streams.values())
        for stream in late:
            stream._fail(EngineUnavailableError("the server shut down before this request had ended"))
        deadline = time.perf_counter() + FLUSH_S
        while not all(stream._closed for stream in late) and time.perf_counter() < deadline:
            await asyncio.sleep(0.02)
        return not late

    def stop(self, timeout_s: float = 5.0) -> None:
        """Ends the thread after its current step; streams of unfinished requests raise EngineFailedError."""
        self.draining = True
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self._thread.join(timeout_s)
        if self._streams:
            self._post(self._end_all, EngineUnavailableError("the engine was stopped before this request had ended"))

    def _send(self, commands: list[Callable[[], object]]) -> None:
        with self._condition:
            self._inbox += commands
            self._condition.notify()

    def _abandon(self, request_ids: set[str]) -> None:
        for request_id in request_ids:
            self._streams.pop(request_id, None)
        if request_ids and self._failure is None:
            self._send([partial(self.engine.abort, request_id) for request_id in request_ids])

    def _admit(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        arrived: float,
        cache: CacheChoice | None,
        plan: EditPlan | None,
        urgency: Urgency,
    ) -> None:
        """Runs in the engine's thread. A request that passed `check` may still fail here; then only it fails."""
        try:
            self.engine.add_request(request_id, prompt, params, arrived, cache, plan, urgency)
        except Exception as failure:
            log(f"request {request_id} failed", failure)
            self._post(self._deliver, [Delta(request_id, "", 0, finish_reason="error", error=message(failure))])

    def _run(self) -> None:
        """The main function of the engine's thread."""
        faults = 0
        try:
            while True:
                with self._condition:
                    while not (self._inbox or self._stopping or self.engine.has_work()):
                        self._condition.wait()
                    inbox, self._inbox = self._inbox, []
                if self._stopping:
                    return
                self._step_started = time.perf_counter()
                try:
                    news = self._work(inbox)
                    if any(delta.error is None for delta in news):
                        faults = 0
                except DeviceError:
                    raise
                except Exception as failure:
                    faults += 1
                    if faults == MAX_FAULTS:
                        raise
                    log("engine step failed, and all requests in it", failure)
                    with self._condition:
                        self._inbox = inbox + self._inbox  # commands that the failed step had not run yet
                    news = self.engine.fail_all(failure)
                self._step_started = None
                if news:
                    self._post(self._deliver, news)
        except Exception as failure:
            log("the engine failed and ends", failure)
            self._failure = failure
            self._post(self._fail_all, failure)

    def _work(self, inbox: list[Callable[[], object]]) -> list[Delta]:
        while inbox:
            inbox.pop(0)()
        return self.engine.step()

    def _post(self, callback: Callable[..., None], argument: object) -> None:
        assert self._loop is not None, "a delta before the first submit"
        try:
            self._loop.call_soon_threadsafe(callback, argument)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    def _deliver(self, news: list[Delta]) -> None:
        for delta in news:
            stream = self._streams.get(delta.request_id)
            if stream is None:
                continue  # closed while this step ran
            if delta.finish_reason is not None:
                del self._streams[delta.request_id]
            stream._put(delta)

    def _fail_all(self, failure: BaseException) -> None:
        self._failure = failure
        self._end_all(failure)

    def _end_all(self, failure: BaseException) -> None:
        for stream in set(self._streams.values()):
            stream._fail(failure)
        self._streams.clear()
