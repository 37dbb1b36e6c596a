"""A `DecoderLM` with lm-eval's interface: log-likelihoods of texts, and generation.

It is not in attnzoo, because lm-eval imports packages (datasets, evaluate) that the library must not need. Where
lm-eval leaves a choice, this adapter chooses like lm-eval's adapter for transformers, so that a model gets the same
numbers with both (tests/integration/test_eval_lm.py compares them):

- Texts begin with the begin token if the model uses one. So do rolling texts, although lm-eval puts the begin token (or
  else the end token) before them too.
- If a context and its continuation exceed the model's context, tokens on the left are dropped; the continuation stays
  whole.
- A generated text is decoded like the beginning of a text, without the space that some vocabularies put there.

Differences: continuations of one text with different lengths are each scored correctly (lm-eval's adapter, in 0.4.13,
caches logits and scores the shorter one with the wrong rows, unless `logits_cache=False`). Log probabilities are
computed in float32. Generation ends at any of the tokenizer's `stop_ids`; the default of `max_gen_toks` is 256 tokens
or half of the context, whichever is less.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from attnzoo.models import DecoderLM, GenerationConfig, Sequences
from attnzoo.models.sampling import Sampling, choice_seed
from attnzoo.tokenizer import StreamDecoder, Tokenizer
from attnzoo.tokenizer.chat import ChatTemplate
from train.bar import Bar

DEFAULT_NEW_TOKENS = 256
SEED_STEP = 0x9E3779B1
"""Difference between the seeds of two requests; a large odd number, so that they do not meet those of another seed."""
GENERATION = ("do_sample", "max_gen_toks", "temperature", "top_k", "top_p", "until")
"""Generation options that a task may set, besides lm-eval's other names for max_gen_toks."""
Pair = tuple[tuple[str, str] | None, list[int], list[int]]
"""(context and continuation as text, token ids of the context, token ids of the continuation)."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Options of a generation; temperature 0 is greedy."""

    until: tuple[str, ...]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int

    @classmethod
    def parse(cls, values: dict[str, Any], max_length: int) -> "Generation":
        """Reads a request's generation_kwargs. Raises ValueError for unknown, contradictory or too large values."""
        default = min(DEFAULT_NEW_TOKENS, max_length // 2)
        known: dict[str, Any] = dict(normalize_gen_kwargs(values, default))
        unknown = sorted(set(known) - set(GENERATION))
        if unknown:
            raise ValueError(f"generation_kwargs: {unknown[0]!r} is not supported; known: {', '.join(GENERATION)}")
        until = tuple(known["until"])
        if not all(isinstance(text, str) for text in until):
            raise ValueError(f"generation_kwargs: until={list(until)} must be texts")
        temperature = float(known.get("temperature") or 0.0)
        if known["do_sample"] and temperature <= 0:
            raise ValueError(f"generation_kwargs: do_sample=true needs a temperature above 0, not {temperature}")
        top_p, top_k = float(known.get("top_p", 1.0)), int(known.get("top_k", 0))
        try:
            Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
        except ValueError as error:
            raise ValueError(f"generation_kwargs: {error}") from None
        tokens = known["max_gen_toks"]
        if not 1 <= tokens < max_length:
            raise ValueError(
                f"generation_kwargs: max_gen_toks={tokens} must be at least 1 and leave room for a context in the "
                f"{max_length} tokens of the model"
            )
        return cls(
            until=until,
            max_tokens=tokens,
            temperature=temperature if known["do_sample"] else 0.0,
            top_p=top_p,
            top_k=top_k,
        )


class AdaptedLM(TemplateLM):
    """A `DecoderLM` and its tokenizer with lm-eval's interface.

    max_length: most tokens of context (None: the model's `max_positions`). batch_size: texts of a forward pass. seed:
    for sampled generation; a text does not depend on its batch. truncated: number of requests that lost tokens on the
    left, by task. Raises ValueError for sizes out of range and a tokenizer that does not match the model.
    """

    def __init__(
        self,
        model: DecoderLM,
        tokenizer: Tokenizer,
        *,
        max_length: int | None = None,
        batch_size: int = 8,
        chat: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        most = model.config.max_positions
        max_length = most if max_length is None else max_length
        if not 2 <= max_length <= most:
            raise ValueError(f"max_length={max_length} must be at least 2 and at most the model's {most} positions")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer knows {tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}; "
                "export the model with its own tokenizer"
            )
        if tokenizer.bos_id is None and tokenizer.eos_id is None:
            raise ValueError("the tokenizer has neither a begin nor an end token, and a text without context needs one")
        self.template = ChatTemplate.of(tokenizer) if chat else None
        if chat and self.template is None:
            raise ValueError("the model has no chat template; evaluate it without --chat")
        self.model, self.tokenizer = model, tokenizer
        self.max_length, self.batch_size, self.seed = max_length, batch_size, seed
        self.truncated: Counter[str] = Counter()
        self._device = model.embedding.weight.device

    @property
    def eot_token_id(self) -> int:
        """The end token, or the begin token if there is none."""
        eos = self.tokenizer.eos_id
        return self.prefix_token_id if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: the begin token, or the end token if there is none."""
        token = self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id
        assert token is not None
        return token

    @property
    def tokenizer_name(self) -> str:
        """A name that identifies the tokenizer and its chat template."""
        return self.tokenizer.fingerprint()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text. add_special_tokens: add the begin token; None: add it unless the text has it."""
        if add_special_tokens is None:
            add_special_tokens = self.tokenizer.encode(string)[:1] != [self.prefix_token_id]
        return self.tokenizer.encode(string, bos=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation. Without a generation prompt it ends within the last message, so that the model
        continues the message. Raises ValueError."""
        if self.template is None:
            raise ValueError("the model was opened without its chat template; use --chat")
        text = self.template.render(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        at = text.rfind(last)
        if at < 0:
            raise ValueError("the chat template changes the last message, so that it cannot be continued")
        return text[: at + len(last)]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log probability, whether greedy decoding would generate it) of each continuation, given its context.

        Raises ValueError for a continuation without tokens, and for one longer than the context.
        """
        return self._loglikelihood_tokens([self._pair(request) for request in requests], disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log probabilities of whole texts, in windows of max_length tokens; each token is predicted once."""
        windows: list[Pair] = []
        owners = []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for index, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[index] += value
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations of contexts, up to the first stop string of a request and without it."""
        groups: dict[Generation, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[Generation.parse(request.args[1], self.max_length)].append(index)
        contexts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        texts = [""] * len(requests)
        with _progress(len(requests), "generate_until", disable_tqdm) as bar:
            for options, indices in groups.items():
                room = self.max_length - options.max_tokens
                for index in indices:
                    self.truncated[requests[index].task_name or ""] += len(contexts[index]) > room
                indices.sort(key=lambda index: -len(contexts[index]))
                for batch in _batches(indices, self.batch_size):
                    new = self._continue([contexts[index][-room:] for index in batch], options, batch)
                    for index, text in zip(batch, new, strict=True):
                        texts[index] = text
                    bar.update(len(batch))
        return texts

    def _pair(self, request: Instance) -> Pair:
        """The token ids of a request; context and continuation are encoded together, and split at the context's end."""
        context, continuation = request.args
        if context:
            before, after = self._encode_pair(context, continuation)
        else:
            before, after = [], self.tok_encode(continuation, add_special_tokens=False)
            if after[:1] == [self.prefix_token_id]:
                before, after = after[:1], after[1:]
        before = before or [self.prefix_token_id]
        where = f"task {request.task_name!r}: the continuation {json.dumps(continuation[:60])}"
        if not after:
            raise ValueError(f"{where} adds no token to its context; write it and the context differently")
        if len(after) > self.max_length:
            raise ValueError(f"{where} has {len(after)} tokens, more than the model's context of {self.max_length}")
        self.truncated[request.task_name or ""] += len(before) + len(after) > self.max_length + 1
        return (context, continuation), before, after

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Scores continuations. Texts that differ only in their last token share one forward pass."""
        shared: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_text, before, after) in enumerate(requests):
            # The model reads all tokens but the last; a text that is too long loses its beginning.
            shared[tuple((before + after)[-(self.max_length + 1) :][:-1])].append(index)
        answers = [(0.0, False)] * len(requests)
        inputs = sorted(shared, key=lambda tokens: (-len(tokens), tokens))
        with _progress(len(requests), "loglikelihood", disable_tqdm) as bar:
            for batch in _batches(inputs, self.batch_size):
                # Padding is on the right, where a causal model does not see it.
                hidden_BTD = self.model.hidden(_pad(batch, self._device))
                for hidden_TD, tokens in zip(hidden_BTD, batch, strict=True):
                    longest = max(len(requests[index][2]) for index in shared[tokens])
                    logits_TV = self.model.logits(hidden_TD[len(tokens) - longest : len(tokens)]).float()
                    for index in shared[tokens]:
                        answers[index] = _answer(logits_TV, requests[index][2])
                    bar.update(len(shared[tokens]))
        return answers

    def _continue(self, contexts: list[list[int]], options: Generation, indices: Sequence[int]) -> list[str]:
        config = GenerationConfig(
            max_new_tokens=options.max_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
        )
        # Equal requests get different texts. On a CPU only the low 32 bits of a seed count.
        seeds = [choice_seed(self.seed, index * SEED_STEP) for index in indices]
        # A model's vocabulary may be larger than its tokenizer's.
        sequences = Sequences(self.model, contexts, config, vocab_size=self.tokenizer.vocab_size, seeds=seeds)
        texts = [_Text(self.tokenizer, options.until) for _ in contexts]
        for _ in range(options.max_tokens):
            for row, token, _logprobs in sequences.step():
                texts[row].push(token)
                if texts[row].done:
                    sequences.end(row)
            if not sequences.running:
                break
        return [text.finish() for text in texts]


class _Text:
    """A generated text, which ends at a stop token or a stop string."""

    def __init__(self, tokenizer: Tokenizer, until: tuple[str, ...]) -> None:
        self.done = False
        self._stop_ids, self._until = tokenizer.stop_ids, [stop for stop in until if stop]
        self._decoder: StreamDecoder = tokenizer.decoder()
        self._text = ""

    def push(self, token: int) -> None:
        self.done = self.done or token in self._stop_ids
        if not self.done:
            self._text += self._decoder.push(token)
            self.done = any(stop in self._text for stop in self._until)

    def finish(self) -> str:
        text: str = postprocess_generated_text(self._text + self._decoder.finish(), self._until, None)
        return text


def _answer(logits_TV: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """(log probability, whether it is greedy) of a continuation. The last row of logits_TV predicts its last token."""
    logits_TV = logits_TV[-len(continuation) :]
    targets_T = torch.tensor(continuation, device=logits_TV.device)
    values_T = logits_TV.log_softmax(-1).gather(-1, targets_T[:, None])
    return values_T.double().sum().item(), bool((logits_TV.argmax(-1) == targets_T).all())


def _pad(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """tokens_BT, padded with zeros on the right."""
    tokens_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for row, tokens in enumerate(rows):
        tokens_BT[row, : len(tokens)] = torch.tensor(tokens)
    return tokens_BT.to(device)


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


def _progress(total: int, name: str, disable: bool) -> Bar:
    return Bar(total=total, desc=name, unit="request", disable=disable)
