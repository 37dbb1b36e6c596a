"""Runs predictions in a thread of their own, within limits: how many at a time, how long, and until when."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from serve.clinical.notes.reader import NoteReader
from serve.clinical.predictor import Deadline, LatePredictionError, Predictor
from serve.config import ServeConfig
from serve.faults import log, message
from serve.metrics import ServerMetrics
from serve.openai.answer import no_model
from serve.openai.errors import ApiError

Served = Predictor | NoteReader
"""A clinical model, of measurements or of texts."""
Result = TypeVar("Result")


class Clinic:
    """The clinical models of a server, and the thread that computes for them. Call the methods from one event loop."""

    def __init__(self, models: Sequence[Served], config: ServeConfig) -> None:
        self.models, self.config = tuple(models), config
        self.draining = False
        self.metrics: ServerMetrics | None = None
        self._running = 0
        self._pool = ThreadPoolExecutor(1, "attnzoo-predict")

    def find(self, name: str) -> Served:
        """The model of this name. Raises ApiError 404."""
        for model in self.models:
            if model.name == name:
                return model
        raise no_model(name, *(model.name for model in self.models))

    def of_bundles(self, name: str | None) -> Predictor:
        """The model that predicts from a FHIR bundle. name: None for the only one. Raises ApiError."""
        found = [one for one in self.models if isinstance(one, Predictor)] if name is None else [self.find(name)]
        if len(found) > 1:
            known = " and ".join(repr(model.name) for model in found)
            raise ApiError(400, f"model is missing, and this server has {known}; name one of them", param="model")
        if not found or not isinstance(found[0], Predictor):
            text = f"{(found or self.models)[0].name!r} reads texts, and is not asked with FHIR resources; send JSON"
            raise ApiError(400, text, param="model", code="unsupported")
        return found[0]

    @contextmanager
    def admitted(self) -> Iterator[Deadline]:
        """Counts a request until it ends; yields its deadline. Raises ApiError 429 or 503."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="unavailable", headers={"retry-after": "5"})
        if self._running >= self.config.max_predictions:
            text = f"{self._running} predictions are running or waiting (max_predictions); try again in a moment"
            raise ApiError(429, text, code="queue_full", headers={"retry-after": "1"})
        self._running += 1
        started = time.perf_counter()
        try:
            yield Deadline(started + self.config.predict_timeout_s)
        finally:
            self._running -= 1
            if self.metrics is not None:
                self.metrics.predicted(time.perf_counter() - started)

    async def work(self, deadline: Deadline, do: Callable[..., Result], *arguments: object) -> Result:
        """Computes in the thread, after what was asked before. Raises ApiError."""

        def timely() -> Result:
            deadline.check()
            return do(*arguments)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, timely)
        except ApiError:
            raise
        except LatePredictionError:
            limit = self.config.predict_timeout_s
            text = f"the prediction was not done within predict_timeout_s={limit:g}; ask for fewer patients at a time"
            raise ApiError(503, text, code="timeout", headers={"retry-after": "5"}) from None
        except Exception as failure:
            log("a prediction failed", failure)
            raise ApiError(500, message(failure), code="request_failed") from None

    async def drain(self, timeout_s: float) -> bool:
        """Refuses new requests and waits for running ones; False if some did not end in time."""
        self.draining = True
        deadline = time.perf_counter() + timeout_s
        while self._running and time.perf_counter() < deadline:
            await asyncio.sleep(0.02)
        return not self._running

    def stop(self) -> None:
        """Ends the thread after what it is computing."""
        self.draining = True
        self._pool.shutdown(wait=False, cancel_futures=True)
