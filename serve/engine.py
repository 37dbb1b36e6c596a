"""The engine: takes requests and generates text, one `step()` at a time. It knows no network and no Ray."""

import itertools
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from attnzoo.attention.edits import EditPlan, EditRun
from attnzoo.kvcache.choice import CacheChoice
from attnzoo.models import DecoderLM
from attnzoo.tokenizer.text_stream import TextStream
from attnzoo.vision.redistribution import FoundSinks, sinks_of
from serve.caches import CacheRules
from serve.config import EngineConfig
from serve.faults import DeviceError, SharedError, log, logger
from serve.loading import load_parts, max_model_len
from serve.metrics import ServerMetrics
from serve.pace import PromptPace
from serve.pool import compiled_step
from serve.prefix import PrefixCache
from serve.prompts import Prompt, PromptEncoder, as_prompt, check_prompt, read_prompts
from serve.request import (
    Alone,
    CacheMemoryError,
    CompletionOutput,
    ContextLengthError,
    Delta,
    FinishReason,
    Request,
    SamplingParams,
    failed,
)
from serve.runner import Runner, StepOutput
from serve.sampler import Drawn, make_generator, sample_rows
from serve.scheduler import Demand, Scheduler, StepPlan
from serve.synchronized import synchronized

if TYPE_CHECKING:
    from attnzoo.tokenizer import Tokenizer


class Engine:
    """Continuous batching of one model.

    model, tokenizer: read from `config.checkpoint` unless given. Raises ValueError if the checkpoint or its chat
    template is damaged, or a setting exceeds what the model supports. Threads may share an engine, but calls that
    compute wait for one another; to run requests of many callers together use `serve.async_engine`.
    """

    def __init__(
        self, config: EngineConfig, *, model: DecoderLM | None = None, tokenizer: "Tokenizer | None" = None
    ) -> None:
        self.config = config
        self.lock = threading.RLock()
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        parts = load_parts(config, model, tokenizer)
        self.model, self.tokenizer, self.modalities = parts.model, parts.tokenizer, parts.modalities
        self.pictures = parts.pictures
        self._sinks: FoundSinks | None = None
        for slow in self.model.config.slow_streaming():
            logger.warning(slow)
        self.max_model_len = max_model_len(config, self.model.config.max_positions)
        self.encoder = PromptEncoder(self.tokenizer, config.control_tokens, self.max_model_len)
        self.chat_template = self.encoder.chat
        self.caches = CacheRules(config.cache or self.model.config.cache, config.cache_bounds)
        self._byte_model = lru_cache(maxsize=256)(lambda choice: self.model.byte_model(choice.build()))
        cell = min(config.prefix_cell, config.max_batched_tokens - config.max_num_seqs)  # what any step has room for
        self.prefixes = PrefixCache(self.model, config.prefix_mib << 20, cell, self.tokenizer.stop_ids)
        self.choose_cache(None)
        for choice in self.caches.examples():
            self._check_bounds(choice)
        self.scheduler = self._new_scheduler()
        rows = config.max_num_seqs if self.caches.exact else 0
        choice, steps = self.caches.default, {}
        if config.compile_decode and not choice.exact:
            steps[choice] = compiled_step(self.model, choice.build(), config.max_num_seqs, self.max_model_len)
        self.runner = Runner(self.model, rows, self.max_model_len, config.compile_decode, steps, self.prefixes)
        self.metrics = ServerMetrics()
        self.pace = PromptPace(None if config.itl_target_ms is None else config.itl_target_ms / 1000)
        self._requests: dict[str, Request] = {}
        self._unread: list[Delta] = []
        """Deltas that the next `step` returns; `generate` and interrupted steps leave those of other requests here."""
        self._ids = itertools.count()

    def _new_scheduler(self) -> Scheduler:
        config = self.config
        return Scheduler(
            config.max_num_seqs,
            config.max_batched_tokens,
            config.max_queue,
            max_groups=config.max_caches,
            max_bytes=None if config.cache_mib is None else config.cache_mib << 20,
            default_group=self.caches.default,
            prefixes=self.prefixes,
        )

    @synchronized
    def sinks(self) -> FoundSinks:
        """The sinks of a model of pictures, measured at the first call. Raises ValueError where they cannot be."""
        assert self.pictures is not None, "the model reads no pictures"
        if self._sinks is None:
            self._sinks = sinks_of(self.pictures)
        return self._sinks

    def encode(self, prompt: str) -> list[int]:
        """As `PromptEncoder.text`."""
        return self.encoder.text(prompt)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation up to the assistant's answer, as `PromptEncoder.conversation`."""
        return self.encoder.conversation(messages)[0]

    def choose_cache(self, asked: Mapping[str, Any] | None) -> CacheChoice:
        """The cache for a request. asked: {"policy": name, option: value}, or None for the engine's default.

        Raises ValueError that names the field if it is unknown, out of range, not allowed, or not for this model.
        """
        choice = self.caches.choose(asked)
        if not choice.exact:
            self._byte_model(choice)  # raises if the policy does not work with this model
        return choice

    def _check_bounds(self, choice: CacheChoice) -> None:
        """Raises ValueError if the bounds allow a policy that does not work with this model."""
        try:
            if not choice.exact:
                self._byte_model(choice)
        except ValueError as error:
            raise ValueError(f"cache_bounds.{choice.policy}: this model cannot have it: {error}") from None

    def _demand(self, choice: CacheChoice, prompt: int, tokens: int, alone: bool = False) -> Demand:
        """The memory that counts against `cache_mib`."""
        if choice.exact and alone:
            return Demand(choice, own_bytes=self.runner.full_bytes(prompt + tokens))
        if choice.exact:
            assert self.runner.full is not None
            return Demand(choice, own_bytes=self.runner.full.row_bytes(prompt + tokens))
        model = self._byte_model(choice)
        streamed = model.policy.prefill == "stream"
        room = min(self.config.max_batched_tokens, prompt) if streamed else prompt
        return Demand(choice, row_bytes=model.compressed(prompt, tokens), prompt_bytes=model.reading(room))

    def check(
        self, prompt: Sequence[int], params: SamplingParams, cache: CacheChoice | None = None, alone: bool = False
    ) -> None:
        """Raises ValueError for a prompt that is empty or has unknown tokens, ContextLengthError if prompt and
        max_tokens exceed the context, CacheMemoryError if the request's cache exceeds `cache_mib`."""
        check_prompt(prompt, self.tokenizer.vocab_size, self.model.config.model_dim)
        total = len(prompt) + params.max_tokens
        if total > self.max_model_len:
            raise ContextLengthError(
                f"this model's context is {self.max_model_len} tokens, but {total} were asked for "
                f"({len(prompt)} in the prompt, max_tokens={params.max_tokens}); shorten the prompt or lower max_tokens"
            )
        most = self._demand(cache or self.caches.default, len(prompt), params.max_tokens, alone).most
        if self.scheduler.max_bytes is not None and most > self.scheduler.max_bytes:
            raise CacheMemoryError(
                f"this request's cache needs {most / 2**20:.1f} MiB, and there are cache_mib={self.config.cache_mib}; "
                "shorten the prompt, or keep less of it"
            )

    @synchronized
    def add_request(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        arrived: float | None = None,
        cache: CacheChoice | None = None,
        plan: EditPlan | None = None,
    ) -> None:
        """Queues a request. arrived: its arrival by time.perf_counter, for the metrics (None: now). cache: from
        `choose_cache`. plan: what it reads and edits of attention. Raises the errors of `check` and `Scheduler.add`."""
        cache = cache or self.caches.default
        self.check(prompt, params, cache, plan is not None)
        total = len(prompt) + params.max_tokens
        request = Request(
            request_id=request_id,
            prompt=as_prompt(prompt),
            params=params,
            text=TextStream(self.tokenizer, params.stop),
            cache=cache,
            group=cache if plan is None else Alone(cache, EditRun(plan), total),
            generator=make_generator(params, self.runner.device),
            arrived=time.perf_counter() if arrived is None else arrived,
        )
        demand = self._demand(cache, len(prompt), params.max_tokens, plan is not None)
        borders = self.prefixes.borders(request.prompt)
        self.scheduler.add(request_id, len(prompt), replace(demand, group=request.group), borders)
        self.prefixes.add(request_id, request.prompt, borders, cache, alone=plan is not None)
        self._requests[request_id] = request

    def has_work(self) -> bool:
        """Whether any request is unfinished, or `step` has deltas to return."""
        return self.scheduler.has_work() or bool(self._unread)

    @synchronized
    def step(self) -> list[Delta]:
        """Runs one step of all sequences that can run, and returns their deltas; an empty list without work.

        A request that fails alone ends with finish_reason "error", and the others go on. Raises DeviceError if the
        device no longer works. Any other exception, an interrupt included, ends all requests; the next step reports
        them as failed.
        """
        deltas, self._unread = self._unread, []
        if self.scheduler.has_work():
            try:
                self._run_step(deltas)
            except DeviceError:
                raise
            except BaseException as failure:
                self._unread = deltas + self.fail_all(failure)
                raise
        return deltas

    def _run_step(self, deltas: list[Delta]) -> None:
        """Appends each delta to `deltas` at once, so that none is lost when a later part of the step raises."""
        started = time.perf_counter()
        plan = self.scheduler.schedule(self.pace.prompt_tokens)
        self._mark_started(plan)
        ran = self.runner.run(plan, self._requests)
        for group, row_bytes in self.runner.joined(plan):
            self.scheduler.measured(group, row_bytes)
        rows = [self._requests[request_id] for request_id in ran.sampled]
        drawn = self._draw(ran, rows)
        decoding = len(plan.decoding)
        self.pace.measured(decoding, plan.num_tokens - decoding, time.perf_counter() - started)
        for request_id, failure in ran.failed.items():
            self._fail(self._requests[request_id], failure, deltas)
        self._update(rows, drawn, deltas)
        self.metrics.step(plan.num_tokens)
        self._publish_load()

    def _draw(self, ran: StepOutput, rows: list[Request]) -> list[Drawn | Exception]:
        if not rows:
            return []
        try:
            # A model's vocabulary may be padded; tokens that the tokenizer does not have are never chosen.
            return sample_rows(ran.logits_RV[:, : self.tokenizer.vocab_size], rows)
        except Exception as failure:
            self.runner.check_device(failure)
            return [SharedError(failure)] * len(rows)

    @synchronized
    def fail_all(self, failure: BaseException) -> list[Delta]:
        """Ends all requests because of `failure`, which cannot be assigned to one of them, and clears their states."""
        requests, self._requests = list(self._requests.values()), {}
        self.scheduler = self._new_scheduler()
        self.runner.clear()
        for request in requests:
            self.metrics.finished(request, "error")
        self._publish_load()
        return [failed(request, SharedError(failure)) for request in requests]

    @synchronized
    def abort(self, request_id: str) -> bool:
        """Ends a request at once and frees its slot; False if the engine does not have it."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._leave(request, "abort")
        self._publish_load()
        return True

    def render_metrics(self) -> bytes:
        """The metrics in Prometheus' text format, with the bytes in use. Any thread may call it."""
        running = [request for request in list(self._requests.values()) if request.started]
        self.metrics.memory(sum(self.runner.kv_bytes(request) for request in running), self.runner.pool_bytes)
        self.metrics.prefixes(*self.prefixes.counts())
        return self.metrics.render()

    @synchronized
    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        cache: Mapping[str, Any] | None = None,
    ) -> list[CompletionOutput]:
        """Completes all prompts (texts or token ids); they may be more than the queue holds. cache: as in
        `choose_cache`.

        A completion that failed has finish_reason "error" and a message; the others are not affected. An interrupt
        removes all requests of this call. Deltas of requests that others have added wait for the next `step`.
        """
        choice = self.choose_cache(cache)
        pending = [self.encode(prompt) if isinstance(prompt, str) else prompt for prompt in read_prompts(prompts)]
        for prompt in pending:
            self.check(prompt, params, choice)
        call = next(self._ids)
        indices = {f"generate-{call}-{index}": index for index in range(len(pending))}
        done: dict[str, CompletionOutput] = {}
        try:
            self._complete(dict(zip(indices, pending, strict=True)), params, choice, done)
        finally:
            for request_id in indices:
                self.abort(request_id)
            self._unread = [delta for delta in self._unread if delta.request_id not in indices]
        return [done[request_id] for request_id in indices]

    def _complete(
        self,
        prompts: dict[str, Sequence[int]],
        params: SamplingParams,
        cache: CacheChoice,
        done: dict[str, CompletionOutput],
    ) -> None:
        """Runs steps until all prompts are in `done`; keeps the deltas of other requests for the next `step`."""
        todo = list(prompts.items())[::-1]
        parts: dict[str, list[Delta]] = {request_id: [] for request_id in prompts}
        others: list[Delta] = []
        try:
            while len(done) < len(prompts):
                while todo and len(self._requests) < self.config.max_num_seqs:
                    request_id, prompt = todo.pop()
                    self.add_request(request_id, prompt, params, cache=cache)
                running = dict(self._requests)
                for delta in self.step():
                    if delta.request_id not in parts:
                        others.append(delta)
                        continue
                    parts[delta.request_id].append(delta)
                    if delta.finish_reason is not None:
                        tokens = running[delta.request_id].generated
                        done[delta.request_id] = CompletionOutput.of(parts[delta.request_id], tokens)
        finally:
            self._unread = others + self._unread

    def _update(self, rows: list[Request], drawn: list[Drawn | Exception], deltas: list[Delta]) -> None:
        now = time.perf_counter()
        for request, found in zip(rows, drawn, strict=True):
            try:
                if isinstance(found, Exception):
                    raise found
                delta = self._advance(request, found, now)
            except Exception as failure:
                self.runner.check_device(failure)
                self._fail(request, failure, deltas)
                continue
            deltas.append(delta)
            if delta.finish_reason is not None:
                self._leave(request, delta.finish_reason)

    def _advance(self, request: Request, drawn: Drawn, now: float) -> Delta:
        """Appends a token to a request, and returns the delta."""
        token, logprob = drawn
        request.generated.append(token)
        self.metrics.token(request, now)
        ends = token in self.tokenizer.stop_ids and not request.params.ignore_eos
        last = len(request.generated) >= request.params.max_tokens
        text, reason = request.text.advance(token, logprob, ends=ends, last=last)
        return self._delta(request, text, reason)

    def _fail(self, request: Request, failure: Exception, deltas: list[Delta]) -> None:
        """Ends one request with the error `failure`."""
        log(f"request {request.request_id} failed", failure)
        deltas.append(failed(request, failure))
        self._leave(request, "error")

    def _delta(self, request: Request, text: str, reason: FinishReason | None) -> Delta:
        delta = Delta(request.request_id, text, len(request.generated), finish_reason=reason)
        if request.params.logprobs is not None:
            delta.logprobs = request.text.take_logprobs(finished=reason is not None)
        if reason is not None:
            delta.prompt_tokens = len(request.prompt)
            delta.ttft_s = request.first_token - request.arrived
            reuse = self.prefixes.plans[request.request_id]
            delta.cached_tokens, delta.not_cached = reuse.reused, reuse.why_not
            delta.run = request.group.run if isinstance(request.group, Alone) else None
            self._report_memory(delta, request)
        return delta

    def _report_memory(self, delta: Delta, request: Request) -> None:
        slot = self.scheduler.tables[request.group].slot_of(request.request_id)
        memory = self.runner.memory(request, slot)
        delta.policy, delta.kept_tokens = request.cache.policy, memory.kept_tokens
        delta.kv_bytes, delta.kv_bytes_full = memory.kv_bytes, memory.kv_bytes_full
        delta.not_compressed = memory.not_compressed

    def _leave(self, request: Request, reason: FinishReason) -> None:
        release = self.scheduler.finish(request.request_id)
        if release is not None:
            self.runner.release(request, release)
        del self._requests[request.request_id]
        self.prefixes.remove(request.request_id)
        self.metrics.finished(request, reason)

    def _mark_started(self, plan: StepPlan) -> None:
        now = time.perf_counter()
        for chunk in plan.prefill:
            request = self._requests[chunk.request_id]
            request.started = request.started or now

    def _publish_load(self) -> None:
        self.metrics.load(self.scheduler.num_running, self.scheduler.num_waiting)
