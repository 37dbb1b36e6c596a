"""Metrics in Prometheus' text format, named like vLLM's with the prefix attnzoo_."""

import time
from collections.abc import Sequence
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serve.request import FinishReason, Request

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
TOKEN_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
REQUEST_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class ServerMetrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self._running = self._gauge("num_requests_running", "Requests with a slot")
        self._waiting = self._gauge("num_requests_waiting", "Requests without a slot")
        self._kv_bytes = self._gauge("kv_bytes", "Bytes of the state filled by running sequences")
        self._pool_bytes = self._gauge("kv_pool_bytes", "Bytes of the state as allocated")
        self._prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens that were looked up")
        self._prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens that were copied, not computed")
        self._prefix_before = (0, 0, 0)
        self._prefix_bytes = self._gauge("prefix_cache_bytes", "Bytes of beginnings of prompts that are kept")
        self._prefix_evictions = self._counter("prefix_cache_evictions", "Cells of prompts that left for room")
        self._aside_bytes = self._gauge("aside_bytes", "Bytes of the state of sequences that were set aside")
        self._preempted = Counter(
            "attnzoo_num_preemptions", "Sequences that were set aside", ["state"], registry=self.registry
        )
        for state in ("kept", "dropped"):
            self._preempted.labels(state)
        self._map_bytes = self._gauge("attention_map_bytes", "Bytes of attention maps, reserved and kept")
        self._prompt = self._counter(
            "prompt_tokens", "Prompt tokens of finished and aborted requests, once for all choices of one"
        )
        self._generated = self._counter("generation_tokens", "Tokens generated")
        self._requests = Counter(
            "attnzoo_request_success", "Requests that left the engine", ["finished_reason"], registry=self.registry
        )
        for reason in get_args(FinishReason):
            self._requests.labels(reason)
        self._answers = Counter(
            "attnzoo_http_responses",
            "Answers to requests for /v1, refusals included",
            ["status"],
            registry=self.registry,
        )
        for status in ("200", "400", "429", "503"):
            self._answers.labels(status)
        self._queue = self._histogram("request_queue_time_seconds", "Arrival to first work", REQUEST_S)
        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token", FIRST_TOKEN_S)
        self._itl = self._histogram("inter_token_latency_seconds", "Between tokens of a request", TOKEN_S)
        self._e2e = self._histogram("e2e_request_latency_seconds", "Arrival to last token", REQUEST_S)
        self._predictions = self._histogram("predict_time_seconds", "Arrival to answer of a prediction", REQUEST_S)
        self._drawings = self._histogram("draw_time_seconds", "Arrival to answer of a request for pictures", REQUEST_S)
        self._drafts = self._counter("spec_decode_num_drafts", "Times that tokens were drafted for a sequence")
        self._drafted = self._counter("spec_decode_num_draft_tokens", "Tokens that were drafted")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Of these, tokens that the model chose, too")
        self._steps = self._counter("steps", "Steps of the engine")
        self._step_tokens = self._counter("step_tokens", "Tokens that went through the model")

    def step(self, tokens: int) -> None:
        """Counts a step in which `tokens` tokens went through the model."""
        self._steps.inc()
        self._step_tokens.inc(tokens)

    def drafted(self, times: int, tokens: int, accepted: int) -> None:
        """Counts drafts of a step, their tokens, and how many of these were right."""
        self._drafts.inc(times)
        self._drafted.inc(tokens)
        self._accepted.inc(accepted)

    def load(self, running: int, waiting: int) -> None:
        """Sets the numbers of running and waiting requests."""
        self._running.set(running)
        self._waiting.set(waiting)

    def memory(self, filled: int, allocated: int) -> None:
        """Sets the bytes of the states that running sequences fill, and of all allocated states."""
        self._kv_bytes.set(filled)
        self._pool_bytes.set(allocated)

    def preempted(self, *, kept: bool) -> None:
        """Counts a sequence that was set aside, with its state or without."""
        self._preempted.labels("kept" if kept else "dropped").inc()

    def aside(self, nbytes: int) -> None:
        """Sets the bytes of sequences that were set aside."""
        self._aside_bytes.set(nbytes)

    def prefixes(self, queries: int, hits: int, nbytes: int, evictions: int) -> None:
        """Sets what was looked up, copied, kept and given up of beginnings of prompts."""
        self._prefix_bytes.set(nbytes)
        counters = (self._prefix_queries, self._prefix_hits, self._prefix_evictions)
        now = (queries, hits, evictions)
        for counter, count, before in zip(counters, now, self._prefix_before, strict=True):
            counter.inc(count - before)
        self._prefix_before = now

    def maps(self, nbytes: int) -> None:
        """Sets the bytes of attention maps: of running requests, and of those that wait for their download."""
        self._map_bytes.set(nbytes)

    def token(self, request: Request, now: float) -> None:
        """Counts a new token of a request, generated at `now` (time.perf_counter)."""
        self._generated.inc()
        if request.first_token:
            self._itl.observe(now - request.last_token)
        else:
            request.first_token = now
            self._ttft.observe(now - request.arrived)
            self._queue.observe(request.started - request.arrived)
        request.last_token = now

    def finished(self, request: Request, reason: FinishReason) -> None:
        """Counts a request that leaves the engine."""
        self._requests.labels(reason).inc()
        if request.params.counts_prompt:
            self._prompt.inc(len(request.prompt))
        if reason in ("stop", "length", "deadline"):
            self._e2e.observe(time.perf_counter() - request.arrived)

    def answered(self, status: int) -> None:
        """Counts an HTTP answer by its status, also for requests that never reached the engine."""
        self._answers.labels(str(status)).inc()

    def predicted(self, seconds: float) -> None:
        """Counts a prediction for patients that has ended, refused ones included."""
        self._predictions.observe(seconds)

    def drawn(self, seconds: float) -> None:
        """Counts a request for pictures that has ended, refused ones included."""
        self._drawings.observe(seconds)

    def render(self) -> bytes:
        """The metrics as text for Prometheus."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, help_text: str) -> Gauge:
        return Gauge(f"attnzoo_{name}", help_text, registry=self.registry)

    def _counter(self, name: str, help_text: str) -> Counter:
        return Counter(f"attnzoo_{name}", help_text, registry=self.registry)

    def _histogram(self, name: str, help_text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"attnzoo_{name}", help_text, buckets=buckets, registry=self.registry)
