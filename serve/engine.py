"""The engine: requests in, text out, one `step()` at a time. No threads, no network, no Ray."""

import itertools
import threading
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from attnzoo.checkpoint import find_checkpoint
from attnzoo.kvcache.choice import CacheChoice
from attnzoo.models import DecoderLM
from attnzoo.tokenizer.chat_tokens import ChatEncoder
from attnzoo.tokenizer.text_stream import TextStream
from serve.alone import alone
from serve.caches import CacheRules
from serve.config import EngineConfig
from serve.faults import DeviceError, SharedError, log
from serve.loading import load_parts, max_model_len
from serve.metrics import ServerMetrics
from serve.pace import PromptPace
from serve.pool import compiled_step
from serve.prompts import Prompt, check_prompt, read_prompts, whole
from serve.request import (
    CacheMemoryError,
    CompletionOutput,
    ContextLengthError,
    Delta,
    FinishReason,
    Request,
    SamplingParams,
    failed,
)
from serve.runner import Ran, Runner
from serve.sampler import Drawn, make_generator, sample_rows
from serve.scheduler import Demand, Scheduler, StepPlan

if TYPE_CHECKING:
    from attnzoo.tokenizer import Tokenizer


class Engine:
    """Continuous batching of one model.

    `model` and `tokenizer` are read from `config.checkpoint` unless given. Raises ValueError when the checkpoint is
    damaged (its chat template included) or the limits do not fit it. Calls of several threads wait for one another:
    requests that run together are for one thread, or for `serve.async_engine`. Any may encode at any time.
    """

    def __init__(
        self, config: EngineConfig, *, model: DecoderLM | None = None, tokenizer: "Tokenizer | None" = None
    ) -> None:
        self.config = config
        self.lock = threading.RLock()
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        directory = find_checkpoint(config.checkpoint)
        self.model, self.tokenizer = load_parts(directory, config, model, tokenizer)
        self.chat_template = chat = ChatEncoder.of(self.tokenizer)
        self._control = self.tokenizer.control_tokens() if chat is None else chat.control
        self.max_model_len = max_model_len(config, self.model)
        self.caches = CacheRules(config.cache or self.model.config.cache, config.cache_bounds)
        self._byte_model = lru_cache(maxsize=256)(lambda choice: self.model.byte_model(choice.build()))
        self.choose_cache(None)
        for choice in self.caches.examples():
            self._check_bounds(choice)
        self.scheduler = self._new_scheduler()
        rows = config.max_num_seqs if self.caches.exact else 0
        choice, steps = self.caches.default, {}
        if config.compile_decode and not choice.exact:
            steps[choice] = compiled_step(self.model, choice.build(), config.max_num_seqs, self.max_model_len)
        self.runner = Runner(self.model, rows, self.max_model_len, config.compile_decode, steps)
        self.metrics = ServerMetrics()
        self.pace = PromptPace(None if config.itl_target_ms is None else config.itl_target_ms / 1000)
        self._requests: dict[str, Request] = {}
        self._unread: list[Delta] = []
        """News that the next step hands over: of requests that `generate` or an interrupted step came by."""
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
        )

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a text prompt, the beginning-of-sequence token first where the vocabulary has one. Raises
        ContextLengthError for a text that is longer than the model can read, before it is encoded."""
        self._check_length(prompt)
        if self.config.control_tokens == "template_only":
            return [*self.tokenizer.encode("", bos=True), *self.tokenizer.encode_text(prompt, self._control)]
        return self.tokenizer.encode(prompt, bos=True)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation up to the assistant's answer. Raises ValueError without a chat template, and when
        the template refuses the conversation; ContextLengthError as `encode`."""
        if self.chat_template is None:
            raise ValueError("this model has no chat template; give a prompt instead of messages")
        text = self.chat_template.template.render(messages)
        self._check_length(text)
        if self.config.control_tokens == "everywhere":
            return self.tokenizer.encode(text)
        return self.chat_template.encode_rendered(text)

    def _check_length(self, text: str) -> None:
        least = self.tokenizer.least_tokens(text)
        if least >= self.max_model_len:
            raise ContextLengthError(
                f"this model's context is {self.max_model_len} tokens, and a text of {len(text)} characters has at "
                f"least {least}; shorten the prompt"
            )

    def choose_cache(self, asked: Mapping[str, Any] | None) -> CacheChoice:
        """The cache of a request that asks for `asked` ({"policy": name, option: value}), None: the engine's own.

        Raises ValueError that names the field for what is unknown, out of range, not allowed, or impossible with this
        model.
        """
        choice = self.caches.choose(asked)
        if not choice.exact:
            self._byte_model(choice)  # refuses what this model cannot have
        return choice

    def _check_bounds(self, choice: CacheChoice) -> None:
        """Raises ValueError for a policy that requests may ask for and this model cannot have."""
        try:
            if not choice.exact:
                self._byte_model(choice)
        except ValueError as error:
            raise ValueError(f"cache_bounds.{choice.policy}: this model cannot have it: {error}") from None

    def _demand(self, choice: CacheChoice, prompt: int, tokens: int) -> Demand:
        """Bytes that count against `cache_mib`; the full cache's rows are there from the start."""
        if choice.exact:
            return Demand(choice)
        model = self._byte_model(choice)
        streamed = model.policy.prefill == "stream"
        room = min(self.config.max_batched_tokens, prompt) if streamed else prompt
        return Demand(choice, row_bytes=model.compressed(prompt, tokens), prompt_bytes=model.reading(room))

    def check(self, prompt: Sequence[int], params: SamplingParams, cache: CacheChoice | None = None) -> None:
        """Raises ValueError for a prompt this model cannot continue, ContextLengthError when it is too long,
        CacheMemoryError when its cache is larger than there is memory for."""
        check_prompt(prompt, self.tokenizer.vocab_size)
        total = len(prompt) + params.max_tokens
        if total > self.max_model_len:
            raise ContextLengthError(
                f"this model's context is {self.max_model_len} tokens, but {total} were asked for "
                f"({len(prompt)} in the prompt, max_tokens={params.max_tokens}); shorten the prompt or lower max_tokens"
            )
        most = self._demand(cache or self.caches.default, len(prompt), params.max_tokens).most
        if self.scheduler.max_bytes is not None and most > self.scheduler.max_bytes:
            raise CacheMemoryError(
                f"this request's cache needs {most / 2**20:.1f} MiB, and there are cache_mib={self.config.cache_mib}; "
                "shorten the prompt, or keep less of it"
            )

    @alone
    def add_request(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        arrived: float | None = None,
        cache: CacheChoice | None = None,
    ) -> None:
        """Queues a request; `arrived` (time.perf_counter) starts its clock; `cache` is from `choose_cache`. Raises as
        `check` and `Scheduler.add`."""
        cache = cache or self.caches.default
        self.check(prompt, params, cache)
        request = Request(
            request_id=request_id,
            prompt=[whole(token) for token in prompt],
            params=params,
            text=TextStream(self.tokenizer, params.stop),
            cache=cache,
            generator=make_generator(params, self.runner.device),
            arrived=time.perf_counter() if arrived is None else arrived,
        )
        self.scheduler.add(request_id, len(prompt), self._demand(cache, len(prompt), params.max_tokens))
        self._requests[request_id] = request

    def has_work(self) -> bool:
        """Whether any request is unfinished, or any news unread."""
        return self.scheduler.has_work() or bool(self._unread)

    @alone
    def step(self) -> list[Delta]:
        """Runs every sequence that can run; returns what is new. Does nothing without work.

        What goes wrong with one sequence is news of that one (finish_reason "error"), and the others go on. Raises
        DeviceError when the device is gone. Any other way out of here, an interrupt included, leaves no request in the
        engine: those that were there are reported as failed by the next step.
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
        """Adds the news as they come about: what was said of a request that left stays said, whatever follows."""
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

    def _draw(self, ran: Ran, rows: list[Request]) -> list[Drawn | Exception]:
        if not rows:
            return []
        try:
            # A vocabulary may be padded beyond the tokenizer's; what stands for nothing is never chosen.
            return sample_rows(ran.logits_RV[:, : self.tokenizer.vocab_size], rows)
        except Exception as failure:
            self.runner.check_device(failure)
            return [SharedError(failure)] * len(rows)

    @alone
    def fail_all(self, failure: BaseException) -> list[Delta]:
        """Ends all requests and forgets their states, for who cannot know whose fault `failure` is."""
        requests, self._requests = list(self._requests.values()), {}
        self.scheduler = self._new_scheduler()
        self.runner.clear()
        for request in requests:
            self.metrics.finished(request, "error")
        self._publish_load()
        return [failed(request, SharedError(failure)) for request in requests]

    @alone
    def abort(self, request_id: str) -> bool:
        """Ends a request at once and frees its slot; False when it is not known (any more)."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._leave(request, "abort")
        self._publish_load()
        return True

    def render_metrics(self) -> bytes:
        """The metrics as Prometheus reads them. Any thread may call it: bytes are summed here, not in every step."""
        running = [request for request in list(self._requests.values()) if request.started]
        self.metrics.memory(sum(self.runner.kv_bytes(request) for request in running), self.runner.pool_bytes)
        return self.metrics.render()

    @alone
    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        cache: Mapping[str, Any] | None = None,
    ) -> list[CompletionOutput]:
        """Completes all prompts (text or token ids) and waits for them; more than the queue holds is fine. `cache` as
        in `choose_cache`.

        A completion with finish_reason "error" failed, and says why; the others are not touched. Interrupted, it leaves
        none of its requests behind. News of requests that others added waits for the next `step`.
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
        prompts: dict[str, list[int]],
        params: SamplingParams,
        cache: CacheChoice,
        done: dict[str, CompletionOutput],
    ) -> None:
        """Runs until all prompts are done; news of other requests stays unread."""
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
        """A token more."""
        token, logprob = drawn
        request.generated.append(token)
        self.metrics.token(request, now)
        ends = token in self.tokenizer.stop_ids and not request.params.ignore_eos
        last = len(request.generated) >= request.params.max_tokens
        text, reason = request.text.advance(token, logprob, ends=ends, last=last)
        return self._delta(request, text, reason)

    def _fail(self, request: Request, failure: Exception, deltas: list[Delta]) -> None:
        """Ends one request by what went wrong with it."""
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
            self._report_memory(delta, request)
        return delta

    def _report_memory(self, delta: Delta, request: Request) -> None:
        slot = self.scheduler.tables[request.cache].slot_of(request.request_id)
        memory = self.runner.memory(request, slot)
        delta.policy, delta.kept_tokens = request.cache.policy, memory.kept_tokens
        delta.kv_bytes, delta.kv_bytes_full = memory.kv_bytes, memory.kv_bytes_full
        delta.not_compressed = memory.not_compressed

    def _leave(self, request: Request, reason: FinishReason) -> None:
        release = self.scheduler.finish(request.request_id)
        if release is not None:
            self.runner.release(request, release)
        del self._requests[request.request_id]
        self.metrics.finished(request, reason)

    def _mark_started(self, plan: StepPlan) -> None:
        now = time.perf_counter()
        for chunk in plan.prefill:
            if chunk.start == 0:
                self._requests[chunk.request_id].started = now

    def _publish_load(self) -> None:
        self.metrics.load(self.scheduler.num_running, self.scheduler.num_waiting)
