"""Greedy and sampled generation through `extend`: the plain loop, for samples and as the server's oracle."""

import operator
from collections.abc import Sequence

import torch

from attnzoo.kvcache import CachePolicy
from attnzoo.models.decoder_lm import DecoderLM
from attnzoo.models.sampling import Sampling, sample

GREEDY = Sampling()


@torch.no_grad()
def generate(
    model: DecoderLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int | None = None,
    stop_token: int | None = None,
    cache: CachePolicy | None = None,
) -> list[list[int]]:
    """Continues each prompt (token ids, unequal lengths welcome) by up to max_new_tokens; returns the new tokens.

    A sequence ends before `stop_token`, which is not returned. `cache` compresses what is kept of the prompts
    (`attnzoo.kvcache.build_cache`). The model stays in its mode. Raises ValueError for no prompts, an empty prompt, a
    token outside the vocabulary, max_new_tokens below 0, a seed of more than 64 bits, sampling options out of range,
    logits that are not finite, or a model whose cache cannot be compressed.
    """
    _check(prompts, max_new_tokens, model.config.vocab_size)
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed={seed} must fit into 64 bits")
    device = model.embedding.weight.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)

    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
    tokens_BT = torch.zeros(len(prompts), int(lengths_B.max()), dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = torch.tensor(list(prompt))
    state = model.init_state(len(prompts), tokens_BT.shape[1] + max_new_tokens, cache=cache)
    hidden_BTD, state = model.extend_hidden(tokens_BT, state, lengths_B)
    if cache is not None:
        state = model.compress(state)
    # Of the prompts' last tokens alone: all logits of 8 x 2,048 tokens and a vocabulary of 49,152 take 3.2 GB.
    hidden_BD = hidden_BTD[torch.arange(len(prompts), device=device), lengths_B - 1]
    del hidden_BTD
    logits_BV = model.logits(hidden_BD)

    outputs: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    for step in range(max_new_tokens):
        next_B = sample(logits_BV, sampling.temperature, sampling.top_p, sampling.top_k, generator)
        for row, token in enumerate(next_B.tolist()):
            if row in running and token == stop_token:
                running.discard(row)
            elif row in running:
                outputs[row].append(token)
        if not running or step == max_new_tokens - 1:
            break
        logits_BTV, state = model.extend(next_B[:, None], state)
        logits_BV = logits_BTV[:, -1]
    return outputs


def _check(prompts: Sequence[Sequence[int]], max_new_tokens: int, vocabulary: int) -> None:
    """Raises ValueError as `generate`."""
    if type(max_new_tokens) is not int or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens!r} must be an integer of at least 0")
    if len(prompts) == 0 or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("prompts must hold at least one prompt, and no prompt may be empty: start with the bos token")
    for prompt in prompts:
        for token in prompt:
            try:
                number = operator.index(token)
            except TypeError:
                raise ValueError(f"prompt token {token!r} is not an integer; encode the text first") from None
            if not 0 <= number < vocabulary:
                raise ValueError(f"prompt token {token} is outside the vocabulary of {vocabulary}")
