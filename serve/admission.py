"""Which requests the engine takes, with which cache, and how much memory they need."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from attnzoo.kvcache.choice import CacheChoice
from attnzoo.models import DecoderLM
from serve.caches import CacheRules
from serve.config import EngineConfig
from serve.prompts import check_prompt
from serve.request import CacheMemoryError, ContextLengthError, SamplingParams
from serve.runner import Runner
from serve.scheduling import Demand

if TYPE_CHECKING:
    from attnzoo.tokenizer import Tokenizer


class Admission:
    """The rules of one engine. Raises ValueError for settings of caches that do not work with the model."""

    def __init__(self, config: EngineConfig, model: DecoderLM, tokenizer: "Tokenizer", max_model_len: int) -> None:
        self.config, self.model, self.tokenizer, self.max_model_len = config, model, tokenizer, max_model_len
        self.caches = CacheRules(config.cache or model.config.cache, config.cache_bounds)
        self.max_bytes = None if config.cache_mib is None else config.cache_mib << 20
        self._byte_model = lru_cache(maxsize=256)(lambda choice: model.byte_model(choice.build()))
        self.choose(None)
        for choice in self.caches.examples():
            try:
                self._check_works(choice)
            except ValueError as error:
                raise ValueError(f"cache_bounds.{choice.policy}: this model cannot have it: {error}") from None

    def choose(self, asked: Mapping[str, Any] | None) -> CacheChoice:
        """As `Engine.choose_cache`."""
        choice = self.caches.choose(asked)
        self._check_works(choice)
        return choice

    def _check_works(self, choice: CacheChoice) -> None:
        """Raises ValueError if the policy does not work with this model."""
        if not choice.exact:
            self._byte_model(choice)

    def demand(self, runner: Runner, choice: CacheChoice, prompt: int, tokens: int, alone: bool = False) -> Demand:
        """The memory that counts against `cache_mib`, of a sequence with so many tokens of its prompt and as many more.
        alone: it reads or edits attention."""
        if choice.exact and alone:
            return Demand(choice, own_bytes=runner.full_bytes(prompt + tokens))
        if choice.exact:
            assert runner.full is not None
            return Demand(choice, own_bytes=runner.full.row_bytes(prompt + tokens))
        model = self._byte_model(choice)
        streamed = model.policy.prefill == "stream"
        room = min(self.config.max_batched_tokens, prompt) if streamed else prompt
        return Demand(choice, row_bytes=model.compressed(prompt, tokens), prompt_bytes=model.reading(room))

    def check(
        self, runner: Runner, prompt: Sequence[int], params: SamplingParams, choice: CacheChoice, alone: bool
    ) -> None:
        """As `Engine.check`."""
        check_prompt(prompt, self.tokenizer.vocab_size, self.model.config.model_dim)
        params.check_tokens(self.tokenizer.vocab_size)
        total = len(prompt) + params.max_tokens
        if total > self.max_model_len:
            raise ContextLengthError(
                f"this model's context is {self.max_model_len} tokens, but {total} were asked for "
                f"({len(prompt)} in the prompt, max_tokens={params.max_tokens}); shorten the prompt or lower max_tokens"
            )
        most = self.demand(runner, choice, len(prompt), params.max_tokens, alone).most
        if self.max_bytes is not None and most > self.max_bytes:
            raise CacheMemoryError(
                f"this request's cache needs {most / 2**20:.1f} MiB, and there are cache_mib={self.config.cache_mib}; "
                "shorten the prompt, or keep less of it"
            )
