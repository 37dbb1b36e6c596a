"""The engine: requests in, text out, one `step()` at a time. No threads, no network, no Ray."""

import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attnzoo.checkpoint import find_checkpoint, load_model, load_tokenizer
from attnzoo.models import DecoderLM, can_pack, pack_weights
from attnzoo.tokenizer.chat_tokens import ChatEncoder
from attnzoo.types import parse_dtype
from serve.caches import CacheChoice, CacheRules
from serve.config import EngineConfig
from serve.metrics import Metrics
from serve.pool import compiled_step
from serve.request import (
    CacheMemoryError,
    Completion,
    ContextLengthError,
    Delta,
    FinishReason,
    Request,
    SamplingParams,
    TokenLogprobs,
)
from serve.runner import Runner
from serve.sampler import make_generator, sample_rows
from serve.scheduler import Demand, Plan, Scheduler
from serve.text import TextStream

if TYPE_CHECKING:
    from attnzoo.tokenizer import Tokenizer


class Engine:
    """Continuous batching of one model.

    `model` and `tokenizer` are read from `config.checkpoint` unless given. Raises ValueError when the checkpoint is
    damaged (its chat template included) or the limits do not fit it. Use from one thread; any may encode.
    """

    def __init__(
        self, config: EngineConfig, *, model: DecoderLM | None = None, tokenizer: "Tokenizer | None" = None
    ) -> None:
        self.config = config
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        directory = find_checkpoint(config.checkpoint)
        self.model = model or _load(directory, config)
        self.tokenizer = tokenizer or load_tokenizer(directory)
        if self.tokenizer.vocab_size > self.model.config.vocab_size:
            raise ValueError(
                f"{directory}: the tokenizer knows {self.tokenizer.vocab_size} tokens, the model only "
                f"{self.model.config.vocab_size}; export the model with its own tokenizer"
            )
        self.chat_template = chat = ChatEncoder.of(self.tokenizer)
        self._control = self.tokenizer.control_tokens() if chat is None else chat.control
        self.max_model_len = config.max_model_len or self.model.config.max_positions
        if self.max_model_len < 2:
            raise ValueError(f"max_model_len={self.max_model_len} leaves no room for a prompt and a token")
        self.caches = CacheRules(config.cache or self.model.config.cache, config.cache_bounds)
        self._byte_model = lru_cache(maxsize=256)(lambda choice: self.model.byte_model(choice.build()))
        self.choose_cache(None)
        self.scheduler = Scheduler(
            config.max_num_seqs,
            config.max_batched_tokens,
            config.max_queue,
            max_groups=config.max_caches,
            max_bytes=None if config.cache_mib is None else config.cache_mib << 20,
        )
        rows = config.max_num_seqs if self.caches.exact else 0
        choice, steps = self.caches.default, {}
        if config.compile_decode and not choice.exact:
            steps[choice] = compiled_step(self.model, choice.build(), config.max_num_seqs, self.max_model_len)
        self.runner = Runner(self.model, rows, self.max_model_len, config.compile_decode, steps)
        self.metrics = Metrics()
        self._requests: dict[str, Request] = {}

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
        vocabulary = self.tokenizer.vocab_size
        if not prompt:
            raise ValueError("the prompt is empty; give at least one token")
        for token in prompt:
            if not 0 <= token < vocabulary:
                raise ValueError(f"prompt token {token} is outside the vocabulary of {vocabulary}")
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
        self.scheduler.add(request_id, len(prompt), self._demand(cache, len(prompt), params.max_tokens))
        self._requests[request_id] = Request(
            request_id=request_id,
            prompt=list(prompt),
            params=params,
            text=TextStream(self.tokenizer, params.stop),
            cache=cache,
            generator=make_generator(params, self.runner.device),
            arrived=time.perf_counter() if arrived is None else arrived,
        )

    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self.scheduler.has_work()

    def step(self) -> list[Delta]:
        """Runs every sequence that can run; returns what is new. Does nothing without work."""
        if not self.has_work():
            return []
        plan = self.scheduler.schedule()
        self._mark_started(plan)
        logits_RV = self.runner.run(plan, self._requests)
        for group, row_bytes in self.runner.joined(plan):
            self.scheduler.measured(group, row_bytes)
        rows = [self._requests[request_id] for request_id in plan.sampled]
        # A vocabulary may be padded beyond the tokenizer's; what stands for nothing is never chosen.
        tokens, logprobs = sample_rows(logits_RV[:, : self.tokenizer.vocab_size], rows)
        deltas = self._update(rows, tokens, logprobs)
        self.metrics.step(plan.num_tokens)
        self._publish_load()
        return deltas

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

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams,
        cache: Mapping[str, Any] | None = None,
    ) -> list[Completion]:
        """Completes all prompts (text or token ids) and waits for them; more than the queue holds is fine. `cache` as
        in `choose_cache`."""
        choice = self.choose_cache(cache)
        pending = [self.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        for prompt in pending:
            self.check(prompt, params, choice)
        todo = list(enumerate(pending))[::-1]
        texts: dict[int, str] = dict.fromkeys(range(len(pending)), "")
        logprobs: dict[int, list[TokenLogprobs]] = {index: [] for index in texts}
        done: dict[int, Completion] = {}
        while len(done) < len(pending):
            while todo and len(self._requests) < self.config.max_num_seqs:
                index, prompt = todo.pop()
                self.add_request(f"generate-{index}", prompt, params, cache=choice)
            running = dict(self._requests)
            for delta in self.step():
                index = int(delta.request_id.removeprefix("generate-"))
                texts[index] += delta.text
                logprobs[index] += delta.logprobs
                if delta.finish_reason is not None:
                    tokens = running[delta.request_id].generated
                    done[index] = Completion(texts[index], tokens, delta.finish_reason, logprobs[index], delta)
        return [done[index] for index in range(len(pending))]

    def _update(self, rows: list[Request], tokens: list[int], logprobs: list[TokenLogprobs | None]) -> list[Delta]:
        now = time.perf_counter()
        deltas = []
        for request, token, logprob in zip(rows, tokens, logprobs, strict=True):
            request.generated.append(token)
            self.metrics.token(request, now)
            ends = token in self.tokenizer.stop_ids and not request.params.ignore_eos
            text = "" if ends else request.text.push(token, logprob)
            reason = self._finish_reason(request, ends)
            if reason is not None:
                text += request.text.finish()
                # The rest of a character or a held back text may complete a stop string.
                reason = "stop" if request.text.stopped else reason
            deltas.append(self._delta(request, text, reason))
            if reason is not None:
                self._leave(request, reason)
        return deltas

    @staticmethod
    def _finish_reason(request: Request, ends: bool) -> FinishReason | None:
        if ends or request.text.stopped:
            return "stop"
        return "length" if len(request.generated) >= request.params.max_tokens else None

    def _delta(self, request: Request, text: str, reason: FinishReason | None) -> Delta:
        delta = Delta(request.request_id, text, len(request.generated), finish_reason=reason)
        if request.params.logprobs is not None:
            delta.logprobs = request.text.take_logprobs(finished=reason is not None)
        if reason is not None:
            delta.prompt_tokens = len(request.prompt)
            delta.ttft_s = request.first_token - request.arrived
            delta.kv_bytes = self.runner.kv_bytes(request)
        return delta

    def _leave(self, request: Request, reason: FinishReason) -> None:
        release = self.scheduler.finish(request.request_id)
        if release is not None:
            self.runner.release(request, release)
        del self._requests[request.request_id]
        self.metrics.finished(request, reason)

    def _mark_started(self, plan: Plan) -> None:
        now = time.perf_counter()
        for chunk in plan.prefill:
            if chunk.start == 0:
                self._requests[chunk.request_id].started = now

    def _publish_load(self) -> None:
        self.metrics.load(self.scheduler.num_running, self.scheduler.num_waiting)


def _load(path: Path, config: EngineConfig) -> DecoderLM:
    dtype = None if config.dtype is None else parse_dtype(config.dtype)
    model = load_model(path, device=config.device, dtype=dtype)
    if config.pack_weights or (config.pack_weights is None and can_pack(model)):
        pack_weights(model)
    return model
