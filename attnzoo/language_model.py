"""`LanguageModel`: a model with its tokenizer, which generates and scores text."""

import operator
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Unpack, overload

import torch

from attnzoo.checkpoint.load import check_fit
from attnzoo.generation import (
    AttentionWish,
    Conversation,
    Generation,
    GenerationCost,
    GenerationOptions,
    GenerationStream,
    GenerationTask,
    Prompt,
    TextLogprobs,
    TokenPrompt,
    as_batch,
    as_conversations,
    check_batch_size,
    encode_conversation,
    generation_cost,
    is_token,
    read_options,
    read_policy,
    run_batched,
    run_task,
)
from attnzoo.kvcache import CachePolicy
from attnzoo.kvcache.choice import CacheSpec, read_cache
from attnzoo.kvcache.full import compressing
from attnzoo.models import DecoderConfig, DecoderLM, EmbeddedPrompt, GenerationConfig
from attnzoo.models.generation_config import FIELDS
from attnzoo.models.score import score
from attnzoo.models.sequences import check_prompts
from attnzoo.tokenizer import Tokenizer
from attnzoo.tokenizer.chat_tokens import ChatEncoder
from attnzoo.tokenizer.spans import message_spans


class LanguageModel:
    """A `DecoderLM` and its tokenizer. `attnzoo.load` reads one from disk; for a model in memory:

    >>> lm = LanguageModel(DecoderLM(config), tokenizer)                 # doctest: +SKIP
    >>> lm.generate("The capital of", max_new_tokens=8).text             # doctest: +SKIP

    name: the model's name in error messages. Not thread-safe. Raises ValueError for a tokenizer with more tokens than
    the model's vocabulary.
    """

    def __init__(self, model: DecoderLM, tokenizer: Tokenizer, *, name: str = "model") -> None:
        for field, value, kind in (("model", model, DecoderLM), ("tokenizer", tokenizer, Tokenizer)):
            if not isinstance(value, kind):
                raise ValueError(
                    f"{field} has type {type(value).__name__}; give a {kind.__name__}, or use attnzoo.load(path)"
                )
        check_fit(model, tokenizer, name)
        self.model, self.tokenizer, self.name = model, tokenizer, name

    def __repr__(self) -> str:
        weight = self.model.embedding.weight
        dtype = str(weight.dtype).removeprefix("torch.")
        return f"LanguageModel({self.name!r}, {self.model.num_parameters():,} parameters, {dtype} on {weight.device})"

    @property
    def config(self) -> DecoderConfig:
        """The model's configuration: sizes, attention variant, max_positions."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.model.embedding.weight.dtype

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a sequence of str, and the first overload takes it
        self,
        prompts: Prompt,
        generation_config: GenerationConfig | None = ...,
        *,
        cache: CacheSpec | None = ...,
        batch_size: int = ...,
        **options: Unpack[GenerationOptions],
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        generation_config: GenerationConfig | None = ...,
        *,
        cache: CacheSpec | None = ...,
        batch_size: int = ...,
        **options: Unpack[GenerationOptions],
    ) -> list[Generation]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        generation_config: GenerationConfig | None = None,
        *,
        cache: CacheSpec | None = None,
        batch_size: int = 8,
        **options: Unpack[GenerationOptions],
    ) -> Generation | list[Generation]:
        """Continues a prompt, or each of a list of prompts: texts, token ids, or an `attnzoo.models.EmbeddedPrompt`.

        Decoding is greedy unless temperature is set, whatever the checkpoint's generation_config.json recommends. A
        text ends at the checkpoint's end tokens. generation_config: its fields may also be given as keywords, which
        take precedence. cache: the cache policy, as a name, as {"policy": name, option: value} or as an object; None:
        the policy of the model's configuration, or the exact cache if it has none. Options of the policy may be
        keywords. batch_size: sequences that run together; it changes results only by rounding. edits, read: what is
        changed and read of attention (`attnzoo.attention.edits`), and spans: what names in them mean (`AttentionWish`).

        >>> lm.generate("The capital of France is", cache="d2o", keep_ratio=0.5).text       # doctest: +SKIP
        >>> [each.text for each in lm.generate(["One", "Two"], temperature=0.8, seed=1)]    # doctest: +SKIP

        Returns a `Generation`, or a list of them in the order of the prompts. Raises ValueError that names the field
        for an empty prompt, a prompt that exceeds the context together with max_new_tokens, a token outside the
        vocabulary, an unknown option, a value out of range, or a cache policy that does not work with this model.
        """
        batch, alone = as_batch(prompts)
        check_batch_size(batch_size)
        task = self._task(self._encoded(batch), generation_config, cache, options)
        found = run_batched(self.model, self.tokenizer, task, batch_size)
        return found[0] if alone else found

    def stream(
        self,
        prompt: Prompt,
        generation_config: GenerationConfig | None = None,
        *,
        cache: CacheSpec | None = None,
        **options: Unpack[GenerationOptions],
    ) -> GenerationStream:
        """Continues one prompt and yields its text piece by piece. Arguments are those of `generate`; n must be 1.

        >>> for piece in lm.stream("Once upon a time", max_new_tokens=64):    # doctest: +SKIP
        ...     print(piece, end="", flush=True)

        Pieces hold whole characters and no part of a stop string. The stream's `result` is what `generate` returns.
        Raises the errors of `generate` before the first piece.
        """
        batch, alone = as_batch(prompt)
        if not alone:
            raise ValueError(f"stream takes one prompt, not a list of {len(batch)}; call it for each, or use generate")
        return self._streamed(self._task(self._encoded(batch), generation_config, cache, options))

    @overload
    def chat(
        self,
        messages: Conversation,
        generation_config: GenerationConfig | None = ...,
        *,
        cache: CacheSpec | None = ...,
        batch_size: int = ...,
        **options: Unpack[GenerationOptions],
    ) -> Generation: ...

    @overload
    def chat(
        self,
        messages: Sequence[Conversation],
        generation_config: GenerationConfig | None = ...,
        *,
        cache: CacheSpec | None = ...,
        batch_size: int = ...,
        **options: Unpack[GenerationOptions],
    ) -> list[Generation]: ...

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        generation_config: GenerationConfig | None = None,
        *,
        cache: CacheSpec | None = None,
        batch_size: int = 8,
        **options: Unpack[GenerationOptions],
    ) -> Generation | list[Generation]:
        """Answers a conversation, or each of a list of conversations, formatted with the checkpoint's chat template.
        Control tokens that a message spells out are encoded as plain text. Without max_new_tokens an answer may fill
        the context. A content may be a list of texts and embeddings: {"type": "text", "text": "..."} and
        {"type": "embeddings", "embeddings": tensor of [rows, model_dim]}. edits and read may name messages: "user",
        "messages[0]" (`attnzoo.tokenizer.spans.message_spans`), and embeddings: "embeddings[0]".

        >>> lm.chat([{"role": "user", "content": "Name a prime number."}]).text    # doctest: +SKIP

        Other arguments, results and errors are those of `generate`. Raises ValueError also if the checkpoint has no
        chat template, or the template refuses a conversation.
        """
        conversations, alone = as_conversations(messages)
        check_batch_size(batch_size)
        task = self._chat_task(conversations, generation_config, cache, options)
        found = run_batched(self.model, self.tokenizer, task, batch_size)
        return found[0] if alone else found

    def stream_chat(
        self,
        messages: Conversation,
        generation_config: GenerationConfig | None = None,
        *,
        cache: CacheSpec | None = None,
        **options: Unpack[GenerationOptions],
    ) -> GenerationStream:
        """Answers a conversation as `chat` does, and yields the text piece by piece as `stream` does."""
        conversations, alone = as_conversations(messages)
        if not alone:
            raise ValueError(f"stream_chat takes one conversation, not a list of {len(conversations)}; use chat")
        return self._streamed(self._chat_task(conversations, generation_config, cache, options))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as `generate` reads it, with the begin token if the model uses one."""
        if not isinstance(text, str):
            raise ValueError(f"text has type {type(text).__name__}; give a str")
        return self.tokenizer.encode(text, bos=True)

    @overload
    def logprobs(  # type: ignore[overload-overlap]  # as in generate
        self, texts: Prompt, *, batch_size: int = ...
    ) -> TextLogprobs: ...

    @overload
    def logprobs(self, texts: Sequence[Prompt], *, batch_size: int = ...) -> list[TextLogprobs]: ...

    def logprobs(self, texts: Prompt | Sequence[Prompt], *, batch_size: int = 8) -> TextLogprobs | list[TextLogprobs]:
        """Log probabilities of the tokens of a text, or of each of a list of texts (or token ids).

        >>> lm.logprobs("Paris is in France.").total < 0    # doctest: +SKIP
        True

        Raises ValueError for an empty text, one longer than the model's context, or a token outside the vocabulary.
        """
        batch, alone = as_batch(texts)
        check_batch_size(batch_size)
        if any(isinstance(text, EmbeddedPrompt) for text in batch):
            raise ValueError("an EmbeddedPrompt has no log probabilities: embeddings are no tokens; give texts or ids")
        tokens = [ids for _, ids in self._encoded(batch)]
        for ids in tokens:
            self._room(len(ids), 0)
        found: list[TextLogprobs] = []
        for first in range(0, len(tokens), batch_size):
            part = tokens[first : first + batch_size]
            scores = score(self.model, part, self.tokenizer.vocab_size)
            found += [TextLogprobs(tuple(ids), (None, *each)) for ids, each in zip(part, scores, strict=True)]
        return found[0] if alone else found

    def cost(
        self, prompt: Prompt | int, *, batch: int = 1, cache: CacheSpec | None = None, **options: Any
    ) -> GenerationCost:
        """The cost of reading a prompt and of one decode step after it, computed without running the model.

        prompt: a text, token ids, or a number of tokens. batch: number of sequences of this length. cache, options: as
        in `generate`, but only those of the cache policy.

        >>> lm.cost(1024, cache="d2o", keep_ratio=0.2).decode.kv_bytes    # doctest: +SKIP
        9717480

        Raises ValueError for a prompt that exceeds the context, and for a cache policy as `generate` does.
        """
        tokens: Any = prompt
        if is_token(prompt):
            tokens = operator.index(prompt)  # type: ignore[arg-type]  # numpy's numbers as well
        elif not isinstance(prompt, int):
            if not hasattr(prompt, "__iter__"):
                raise ValueError(f"prompt={prompt!r} must be a text, token ids, or a number of tokens")
            prompts, alone = as_batch(prompt)
            if not alone:
                count = len(prompts)
                raise ValueError(f"cost takes one prompt, not a list of {count}; give one, and batch={count}")
            tokens = len(self._encoded(prompts)[0][1])
        for name, value in (("prompt", tokens), ("batch", batch)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number, at least 1")
        self._room(tokens, 1)
        for name in FIELDS:
            if name in options:
                raise ValueError(f"{name}={options[name]!r} is a generation option; cost takes only cache options")
        policy = read_policy(cache, options)
        return generation_cost(self.model, tokens, batch, self._checked_cache(policy))

    @cached_property
    def _chat(self) -> ChatEncoder | None:
        return ChatEncoder.of(self.tokenizer)

    def _encoded(self, prompts: Sequence[Prompt]) -> list[TokenPrompt]:
        """(text, token ids) of each prompt. Raises ValueError for an empty one, and for ids outside the vocabulary."""
        found = []
        for number, prompt in enumerate(prompts):
            text, ids = (prompt, self.encode(prompt)) if isinstance(prompt, str) else (None, prompt)
            if not ids or text == "":  # a begin token would precede the text; its id alone is a prompt
                which = "the prompt" if len(prompts) == 1 else f"prompts[{number}]"
                raise ValueError(f"{which} is empty; give at least one character or token")
            check_prompts([ids], self.tokenizer.vocab_size, self.config.model_dim)
            found.append((text, ids))
        return found

    def _task(
        self,
        prompts: list[TokenPrompt],
        base: GenerationConfig | None,
        cache: CacheSpec | None,
        options: Mapping[str, Any],
        conversations: Sequence[Conversation] = (),
    ) -> GenerationTask:
        wish, options = AttentionWish.taken_from(options)
        config, policy = read_options(base, cache, options, AttentionWish.NAMES)
        limits = [self._room(len(ids), config.max_new_tokens) for _, ids in prompts]
        tokens = [ids for _, ids in prompts]
        named = None
        if self._chat is not None and conversations and not wish.is_empty:
            named = [
                message_spans(self._chat.template, self.tokenizer, messages, ids)
                for messages, ids in zip(conversations, tokens, strict=True)
            ]
        plans = wish.plans(self.model, self.tokenizer, tokens, limits, named)
        return GenerationTask(prompts, limits, config, self._checked_cache(policy), plans)

    def _chat_task(
        self,
        conversations: Sequence[Conversation],
        base: GenerationConfig | None,
        cache: CacheSpec | None,
        options: Mapping[str, Any],
    ) -> GenerationTask:
        if self._chat is None:
            raise ValueError(f"{self.name} has no chat template; continue a text with generate")
        default = GenerationConfig(max_new_tokens=None) if base is None else base
        found = [encode_conversation(self._chat, each) for each in conversations]
        prompts: list[TokenPrompt] = [(None, ids) for _, ids in found]
        check_prompts([ids for _, ids in prompts], self.tokenizer.vocab_size, self.config.model_dim)
        return self._task(prompts, default, cache, options, [messages for messages, _ in found])

    def _checked_cache(self, policy: CachePolicy | None) -> CachePolicy | None:
        """The policy to use (default: that of the model's configuration); None for the exact cache. Raises ValueError
        if the policy does not work with this model."""
        if policy is None and self.config.cache is not None:
            policy = read_cache(self.config.cache)
        policy = compressing(policy)
        if policy is not None:
            self.model.byte_model(policy)
        return policy

    def _room(self, prompt: int, new: int | None) -> int:
        """Most new tokens after a prompt of `prompt` tokens, of which `new` were requested (None: all that fit). Raises
        ValueError if they exceed the context."""
        most = self.config.max_positions
        total = prompt + (1 if new is None else new)
        if total > most:
            asked = "" if not new else f", max_new_tokens={new}"
            raise ValueError(
                f"the model's context is {most} tokens, and {total} were asked for ({prompt} in the prompt{asked}); "
                f"shorten the prompt{' or lower max_new_tokens' if new else ''}"
            )
        return most - prompt if new is None else new

    def _streamed(self, task: GenerationTask) -> GenerationStream:
        if task.config.n > 1:
            raise ValueError(f"n={task.config.n}: a stream is one text; use generate for several")
        return GenerationStream(run_task(self.model, self.tokenizer, task))
