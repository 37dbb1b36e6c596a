"""Completes a list of prompts with an engine, in this thread."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from attnzoo.kvcache.choice import CacheChoice
from serve.config import EngineConfig
from serve.request import CompletionOutput, Delta, Request, SamplingParams


class Steps(Protocol):
    """What of an `Engine` is needed."""

    config: EngineConfig

    @property
    def num_requests(self) -> int:
        """As `Engine.num_requests`."""

    def add_request(
        self, request_id: str, prompt: Sequence[int], params: SamplingParams, *, cache: CacheChoice
    ) -> Request:
        """As `Engine.add_request`."""

    def step(self) -> list[Delta]:
        """As `Engine.step`."""

    def put_back(self, deltas: list[Delta]) -> None:
        """As `Engine.put_back`."""


def complete_all(
    engine: Steps, prompts: Mapping[str, Sequence[int]], params: SamplingParams, cache: CacheChoice
) -> dict[str, CompletionOutput]:
    """Runs steps until the prompts, which are named by ids of requests, are completed. They may be more than the queue
    holds. Deltas of other requests wait for the next `Engine.step`."""
    todo = list(prompts.items())[::-1]
    requests: dict[str, Request] = {}
    parts: dict[str, list[Delta]] = {request_id: [] for request_id in prompts}
    done: dict[str, CompletionOutput] = {}
    others: list[Delta] = []
    try:
        while len(done) < len(prompts):
            while todo and engine.num_requests < engine.config.max_num_seqs:
                request_id, prompt = todo.pop()
                requests[request_id] = engine.add_request(request_id, prompt, params, cache=cache)
            for delta in engine.step():
                if delta.request_id not in parts:
                    others.append(delta)
                    continue
                parts[delta.request_id].append(delta)
                if delta.finish_reason is not None:
                    tokens = requests[delta.request_id].generated
                    done[delta.request_id] = CompletionOutput.of(parts[delta.request_id], tokens)
    finally:
        engine.put_back(others)
    return done
