"""The next token of every row: greedy rows together, drawn rows each from its own generator."""

import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from attnzoo.models.sampling import sample
from serve.request import Request, SamplingParams, TokenLogprobs


def make_generator(params: SamplingParams, device: torch.device) -> torch.Generator | None:
    """A generator of its own for a request that draws, so that its text does not depend on its neighbours."""
    if params.temperature == 0:
        return None
    seed = params.seed if params.seed is not None else secrets.randbits(63)
    return torch.Generator(device).manual_seed(seed)


def sample_rows(logits_RV: Tensor, requests: Sequence[Request]) -> tuple[list[int], list[TokenLogprobs | None]]:
    """Tokens of the rows, and log probabilities for requests that ask for them (of the model: before temperature,
    top_k and top_p)."""
    tokens: list[int] = logits_RV.argmax(-1).tolist()
    logprobs: list[TokenLogprobs | None] = [None] * len(tokens)
    for row, request in enumerate(requests):
        params = request.params
        if params.temperature > 0:
            drawn = sample(logits_RV[row : row + 1], params.temperature, params.top_p, params.top_k, request.generator)
            tokens[row] = int(drawn)
        if params.logprobs is not None:
            logprobs[row] = _logprobs(logits_RV[row], tokens[row], params.logprobs)
    return tokens, logprobs


def _logprobs(logits_V: Tensor, token: int, alternatives: int) -> TokenLogprobs:
    values_V = logits_V.float().log_softmax(-1)
    best = values_V.topk(min(alternatives, len(values_V)))
    top = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprobs(token, float(values_V[token]), top)
