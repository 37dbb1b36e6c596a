"""The engine: takes requests and generates text, one `step()` at a time. It knows no network and no Ray."""

import itertools
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnzoo.attention.edits import EditPlan, EditRun
from attnzoo.kvcache.choice import CacheChoice
from attnzoo.models import DecoderLM
from attnzoo.tokenizer.text_stream import TextStream
from attnzoo.vision.redistribution import FoundSinks, sinks_of
from serve.admission import Admission
from serve.batch import complete_all
from serve.config import EngineConfig
from serve.faults import DeviceError, SharedError, log, logger
from serve.loading import load_parts, max_model_len
from serve.metrics import ServerMetrics
from serve.pools import compiled_step
from serve.preemption import AHEAD, Preemption
from serve.prefix import PrefixCache
from serve.prompt_scores import PromptScores
from serve.prompts import Prompt, PromptEncoder, as_prompt, read_prompts
from serve.request import (
    USUAL,
    Alone,
    CompletionOutput,
    Delta,
    FinishReason,
    Request,
    SamplingParams,
    Urgency,
    failed,
    whole_reason,
)
from serve.runner import Runner
from serve.sampler import Drawn, make_changes, make_generator, sample_rows
from serve.scheduling import PromptPace, Scheduler, StepPlan
from serve.speculation import Speculation
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
        self.admission = Admission(config, self.model, self.tokenizer, self.max_model_len)
        self.caches = self.admission.caches
        cell = min(config.prefix_cell, config.max_batched_tokens - config.max_num_seqs)  # what any step has room for
        self.prefixes = PrefixCache(self.model, config.prefix_mib << 20, cell, self.tokenizer.stop_ids)
        self.scheduler = self._new_scheduler()
        rows = config.max_num_seqs if self.caches.exact else 0
        if config.prompt_lookup and not rows:
            raise ValueError(
                f"prompt_lookup={config.prompt_lookup} drafts tokens of the full cache, which no request may have "
                "here (cache, cache_bounds); set prompt_lookup=0"
            )
        choice, steps = self.caches.default, {}
        if config.compile_decode and not choice.exact:
            steps[choice] = compiled_step(self.model, choice.build(), config.max_num_seqs, self.max_model_len)
        vocab_size = self.tokenizer.vocab_size
        self.runner = Runner(
            self.model, rows, self.max_model_len, config.compile_decode, steps, self.prefixes, vocab_size
        )
        self.speculation = Speculation(config.prompt_lookup)
        self.metrics = ServerMetrics()
        self.preemption = Preemption(self.runner, self.prefixes, self.metrics)
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
            max_bytes=self.admission.max_bytes,
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
        return self.admission.choose(asked)

    def check(
        self, prompt: Sequence[int], params: SamplingParams, cache: CacheChoice | None = None, alone: bool = False
    ) -> None:
        """Raises ValueError for a prompt that is empty or has unknown tokens, ContextLengthError if prompt and
        max_tokens exceed the context, CacheMemoryError if the request's cache exceeds `cache_mib`. alone: it reads or
        edits attention."""
        self.admission.check(self.runner, prompt, params, cache or self.caches.default, alone)

    @synchronized
    def add_request(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        arrived: float | None = None,
        cache: CacheChoice | None = None,
        plan: EditPlan | None = None,
        urgency: Urgency = USUAL,
    ) -> Request:
        """Queues a request, and returns it. arrived: its arrival by time.perf_counter, for the metrics and its deadline
        (None: now). cache: from `choose_cache`. plan: what it reads and edits of attention. Raises the errors of
        `check` and `Scheduler.add`."""
        cache, alone = cache or self.caches.default, plan is not None
        self.check(prompt, params, cache, alone)
        total = len(prompt) + params.max_tokens
        ahead = min(params.max_tokens, AHEAD) if cache.exact and not alone else params.max_tokens
        request = Request(
            request_id=request_id,
            prompt=as_prompt(prompt),
            params=params,
            text=TextStream(self.tokenizer, params.stop),
            cache=cache,
            group=cache if plan is None else Alone(cache, EditRun(plan), total),
            generator=make_generator(params, self.runner.device),
            changes=make_changes(params, prompt, self.tokenizer.vocab_size, self.runner.device),
            scores=PromptScores.of(as_prompt(prompt), params.prompt_logprobs),
            ends=params.ends(self.tokenizer.stop_ids),
            arrived=time.perf_counter() if arrived is None else arrived,
            urgency=urgency,
            room=len(prompt) + ahead,
        )
        demand = replace(self.admission.demand(self.runner, cache, len(prompt), ahead, alone), group=request.group)
        borders = self.prefixes.borders(request.prompt)
        self.scheduler.add(request_id, len(prompt), demand, borders, priority=urgency.priority, movable=not alone)
        self.prefixes.add(request_id, request.prompt, borders, cache, whole=whole_reason(request))
        self._requests[request_id] = request
        return request

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
        for request in [request for request in self._requests.values() if request.is_late]:
            self._end_late(request, deltas)
        self.preemption.make_room(self.scheduler, self._requests)
        plan = self.scheduler.schedule(self.pace.prompt_tokens)
        self._mark_started(plan)
        decoding = len(plan.decoding)
        drafts = self.speculation.drafts(plan, self._requests, self.config.max_batched_tokens - decoding)
        ran = self.runner.run(plan, self._requests, drafts)
        for resume in plan.resumed:
            self.preemption.forget(self._requests[resume.request_id])
        for group, row_bytes in self.runner.joined(plan):
            self.scheduler.measured(group, row_bytes)
        sampled = [self._requests[request_id] for request_id in ran.sampled]
        new = [row for row, request in enumerate(sampled) if not request.repeats]
        for request in sampled:
            request.repeat()
        rows = [sampled[row] for row in new]
        drawn = self._draw(ran.logits_RV if len(rows) == len(sampled) else ran.logits_RV[new], rows)
        seconds = time.perf_counter() - started
        if plan.num_tokens and not drafts:
            self.pace.measured(decoding, plan.num_tokens - decoding, seconds)
        self.speculation.measured(plan, drafts, ran.sampled, self._requests, seconds)
        for request_id, failure in ran.failed.items():
            self._fail(self._requests[request_id], failure, deltas)
        self._update(rows, drawn, deltas)
        drafted = sum(map(len, drafts.values()))
        self.metrics.step(plan.num_tokens + drafted)
        self.metrics.drafted(len(drafts), drafted, len(ran.sampled) - len(set(ran.sampled)))
        self._publish_load()

    def _end_late(self, request: Request, deltas: list[Delta]) -> None:
        """Ends a request whose deadline has passed, with the text that there is."""
        text = request.text.finish()
        deltas.append(self._delta(request, text, "stop" if request.text.stopped else "deadline"))
        self._leave(request, "deadline")

    def _draw(self, logits_RV: Tensor, rows: list[Request]) -> list[Drawn | Exception]:
        if not rows:
            return []
        try:
            # A model's vocabulary may be padded; tokens that the tokenizer does not have are never chosen.
            return sample_rows(logits_RV[:, : self.tokenizer.vocab_size], rows)
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
        running = [r for r in list(self._requests.values()) if r.started and r.aside is None]
        self.metrics.memory(sum(self.runner.kv_bytes(request) for request in running), self.runner.pool_bytes)
        self.metrics.prefixes(*self.prefixes.counts())
        self.metrics.aside(self.prefixes.tree.lent)
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
        named = {f"generate-{call}-{index}": prompt for index, prompt in enumerate(pending)}
        try:
            done = complete_all(self, named, params, choice)
        finally:
            for request_id in named:
                self.abort(request_id)
            self._unread = [delta for delta in self._unread if delta.request_id not in named]
        return [done[request_id] for request_id in named]

    def put_back(self, deltas: list[Delta]) -> None:
        """The next `step` returns these first."""
        self._unread = deltas + self._unread

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    def _update(self, rows: list[Request], drawn: list[Drawn | Exception], deltas: list[Delta]) -> None:
        now = time.perf_counter()
        for request, found in zip(rows, drawn, strict=True):
            if request.request_id not in self._requests:
                continue  # it has ended with an earlier one of its tokens
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
        stops = request.may_end  # a stop string counts behind `min_tokens` tokens, as a token that ends the text does
        request.generated.append(token)
        if not request.first_token:
            request.cached = self.prefixes.plans[request.request_id].reused
        self.metrics.token(request, now)
        last = len(request.generated) >= request.params.max_tokens
        text, reason = request.text.advance(token, logprob, ends=token in request.ends, last=last, stops=stops)
        return self._delta(request, text, reason)

    def _fail(self, request: Request, failure: Exception, deltas: list[Delta]) -> None:
        """Ends one request with the error `failure`."""
        log(f"request {request.request_id} failed", failure)
        deltas.append(failed(request, failure))
        self._leave(request, "error")

    def _delta(self, request: Request, text: str, reason: FinishReason | None) -> Delta:
        delta = Delta(request.request_id, text, request.count, finish_reason=reason)
        if request.params.logprobs is not None:
            delta.logprobs = request.text.take_logprobs(finished=reason is not None)
        if request.scores is not None and request.count == 1:
            delta.prompt_logprobs = request.scores.found
        if reason is not None:
            delta.prompt_tokens = len(request.prompt)
            delta.ttft_s = request.first_token - request.arrived if request.first_token else 0.0
            delta.cached_tokens = request.cached
            delta.not_cached = self.prefixes.plans[request.request_id].why_not
            delta.accepted_tokens = request.drafts.accepted
            delta.rejected_tokens = request.drafts.drafted - request.drafts.accepted
            delta.run = request.group.run if isinstance(request.group, Alone) else None
            delta.policy = request.cache.policy
            if self.scheduler.decodes(request.request_id):
                self._report_memory(delta, request)
        return delta

    def _report_memory(self, delta: Delta, request: Request) -> None:
        slot = self.scheduler.tables[request.group].slot_of(request.request_id)
        memory = self.runner.memory(request, slot)
        delta.kept_tokens = memory.kept_tokens
        delta.kv_bytes, delta.kv_bytes_full = memory.kv_bytes, memory.kv_bytes_full
        delta.not_compressed = memory.not_compressed

    def _leave(self, request: Request, reason: FinishReason) -> None:
        release = self.scheduler.finish(request.request_id)
        if release is not None:
            self.runner.release(request, release)
        self.preemption.forget(request)
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
