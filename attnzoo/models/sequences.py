"""The one loop that continues sequences token by token: `generate` returns them, `attnzoo.language_model` their
text."""

import operator
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from attnzoo.attention.edits import EditRuns
from attnzoo.kvcache import CachePolicy
from attnzoo.kvcache.full import compressing
from attnzoo.models.cache_use import CacheUse, compressed_use, exact_use
from attnzoo.models.decoder_lm import DecoderLM, DecoderState
from attnzoo.models.embedded import EmbeddedPrompt, prompt_tensor, token_ids
from attnzoo.models.generation_config import LEAST_SEED, GenerationConfig
from attnzoo.models.logit_changes import LogitChanges
from attnzoo.models.row_sampling import Change, choose_rows, row_wish
from attnzoo.models.sampling import EDITED_NOT_FINITE, NOT_FINITE, TokenLogprobs, check_known, choice_seed, greedy

PROMPT_CHUNK = 256
"""Tokens of a prompt that are read at a time, the default of a server's cells (`prefix_cell`) too: a policy with
prefill="stream" compresses after each chunk."""
ROOM = 512
"""Tokens beyond the prompt that a full cache has room for from the start; it grows for more."""


class Sequences:
    """Sequences that a model continues together. `step` draws the next token of each that runs; `end` stops one.

    Row i * n + j is continuation j (of config.n) of prompt i. cache: the cache policy; None: the full cache.
    vocab_size: tokens from this id on are never drawn (a model's table may be longer than its tokenizer's); None: all
    may be. edits: one run a row (`EditRun`), which go with prompt and continuation until the row ends. seeds: one per
    row; None: config.seed for the first continuation of every prompt, and the numbers that follow it for the others. A
    row depends on the others by rounding only.

    Prompts are token ids, or an `EmbeddedPrompt` each. Raises ValueError for no prompts, an empty prompt, a token
    outside the vocabulary, embeddings of another width, and a model whose cache cannot be compressed.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: DecoderLM,
        prompts: Sequence[Sequence[int]],
        config: GenerationConfig,
        *,
        cache: CachePolicy | None = None,
        vocab_size: int | None = None,
        seeds: Sequence[int] | None = None,
        edits: EditRuns | None = None,
    ) -> None:
        check_prompts(prompts, model.config.vocab_size, model.config.model_dim)
        if edits is not None and config.n > 1:
            changed = any(run is not None and run.plan.changes for run in edits)
            raise ValueError(
                f"n={config.n} with {'edits' if changed else 'read'}: a run reads one sequence; ask for n=1, or call "
                "once for each"
            )
        self.model, self.config = model, config
        self._cache = compressing(cache)
        self._vocab_size = vocab_size or model.config.vocab_size
        check_known("logit_bias", config.logit_bias, self._vocab_size)
        self._edits = edits
        hidden_BD, state = _read(model, prompts, config.max_new_tokens, self._cache, edits)
        order = [row for row in range(len(prompts)) for _ in range(config.n)]
        if config.n > 1:
            hidden_BD, state = hidden_BD[order], state.keep_rows(order)
        self._hidden_BD, self._state = hidden_BD, state
        self._prompt_lengths = [len(prompts[row]) for row in order]
        device = model.embedding.weight.device
        self._generators = _generators(config, len(order), device, seeds)
        self._changes = [LogitChanges.of(config, prompts[row], self._vocab_size, device) for row in order]
        self._tokens: list[list[int]] = [[] for _ in order]
        self.running = list(range(len(order)))
        """Rows that have not ended."""

    @torch.no_grad()
    def step(self) -> list[tuple[int, int, TokenLogprobs | None]]:
        """(row, token, its log probabilities where config.logprobs asks for them) of every running row.

        Raises ValueError where the model's logits are not finite.
        """
        device = self.model.embedding.weight.device
        if any(self._tokens):
            next_B = torch.tensor([tokens[-1] for tokens in self._tokens], device=device)
            edits = self._edits
            if edits is not None:  # rows that have ended go on without
                edits = [run if row in self.running else None for row, run in enumerate(edits)]
            hidden_BTD, self._state = self.model.extend_hidden(next_B[:, None], self._state, edits=edits)
            self._hidden_BD = hidden_BTD[:, -1]
        logits_BV = self.model.logits(self._hidden_BD)[:, : self._vocab_size]
        wishes = [row_wish(self.config, logits_BV, self._generators[row], self._change(row)) for row in self.running]
        chosen = choose_rows(logits_BV if len(wishes) == len(logits_BV) else logits_BV[self.running], wishes)
        drawn = []
        for row, found in zip(self.running, chosen, strict=True):
            if found is None:
                run = None if self._edits is None else self._edits[row]
                raise ValueError(EDITED_NOT_FINITE if run is not None and run.plan.changes else NOT_FINITE)
            self._tokens[row].append(found[0])
            drawn.append((row, *found))
        return drawn

    def _change(self, row: int) -> Change | None:
        changes = self._changes[row]
        return None if changes is None else partial(changes.apply, tokens=self._tokens[row])

    def end(self, row: int) -> None:
        """Stops a row: `step` draws no further token of it."""
        self.running.remove(row)

    def cache_use(self, row: int) -> CacheUse:
        """What the cache did for a running row. Its newest token has not been through the model and is not counted."""
        context = self._prompt_lengths[row] + max(len(self._tokens[row]) - 1, 0)
        kv_bytes = self.model.cost(batch=1, tokens=1, context=context).state_bytes
        full = exact_use(self.model, context, kv_bytes)
        if self._cache is None:
            return full
        return compressed_use(self._cache, self._state.layers, row, self._prompt_lengths[row], full)


def _read(
    model: DecoderLM,
    prompts: Sequence[Sequence[int]],
    new: int | None,
    cache: CachePolicy | None,
    edits: EditRuns | None,
) -> tuple[Tensor, DecoderState]:
    """(hidden_BD of each prompt's last token, the state after it). Prompts of a compressed cache are read one after the
    other, so that only one full cache exists at a time."""
    longest = max(map(len, prompts))
    if cache is None:
        return _read_together(model, prompts, longest + (ROOM if new is None else min(ROOM, new)), None, edits)
    hidden: list[Tensor] = []
    state: DecoderState | None = None
    for number, prompt in enumerate(prompts):
        # A policy that compresses while it reads needs no room for the whole prompt.
        room = min(PROMPT_CHUNK, len(prompt)) if cache.prefill == "stream" else len(prompt)
        hidden_1D, row = _read_together(model, [prompt], room, cache, None if edits is None else [edits[number]])
        row = model.compress(row, joinable=True)
        state = row if state is None else state.joined(row)
        hidden.append(hidden_1D)
    assert state is not None
    return torch.cat(hidden), state


def _read_together(
    model: DecoderLM,
    prompts: Sequence[Sequence[int]],
    capacity: int,
    cache: CachePolicy | None,
    edits: EditRuns | None,
) -> tuple[Tensor, DecoderState]:
    lengths, device = [len(prompt) for prompt in prompts], model.embedding.weight.device
    state = model.init_state(len(prompts), capacity, cache=cache)
    ends: dict[int, Tensor] = {}
    for first in range(0, max(lengths), PROMPT_CHUNK):
        chunk = prompt_tensor(model, [prompt[first : first + PROMPT_CHUNK] for prompt in prompts])
        counts = [min(max(length - first, 0), chunk.shape[1]) for length in lengths]
        padded = min(counts) < chunk.shape[1]
        hidden_BTD, state = model.extend_hidden(
            chunk, state, torch.tensor(counts, device=device) if padded else None, edits=edits
        )
        # Only for the prompts' last tokens: all logits of 8 x 2,048 tokens and a vocabulary of 49,152 take 3.2 GB.
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            if count and first + count == length:
                ends[row] = hidden_BTD[row, count - 1].clone()
    return torch.stack([ends[row] for row in range(len(prompts))]), state


def _generators(
    config: GenerationConfig, rows: int, device: torch.device, seeds: Sequence[int] | None
) -> list[torch.Generator | None]:
    """A random generator of its own for each row, so that its text does not depend on the others; None where greedy."""
    if greedy(config.temperature):
        return [None] * rows
    if seeds is None and config.seed is None:
        seeds = torch.randint(LEAST_SEED, 2**63 - 1, (rows,)).tolist()
    elif seeds is None:
        assert config.seed is not None
        seeds = [choice_seed(config.seed, row % config.n) for row in range(rows)]
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def check_prompts(prompts: Sequence[Sequence[int]], vocabulary: int, width: int) -> None:
    """Raises ValueError for no prompts, an empty one, a token that is not an integer below `vocabulary`, and embeddings
    that are not `width` numbers each."""
    if len(prompts) == 0 or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("prompts must hold at least one prompt, and no prompt may be empty: start with the bos token")
    for prompt in prompts:
        if isinstance(prompt, EmbeddedPrompt):
            prompt.check_width(width)
        for token in token_ids(prompt):
            try:
                number = operator.index(token)
            except TypeError:
                raise ValueError(f"prompt token {token!r} is not an integer; encode the text first") from None
            if not 0 <= number < vocabulary:
                raise ValueError(f"prompt token {token} is outside the vocabulary of {vocabulary}")
