"""The next token of every row: greedy rows together, drawn rows each from its own generator."""

import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from attnzoo.models.sampling import NOT_FINITE, TokenLogprobs, greedy, sample, token_logprobs
from serve.faults import LogitsError
from serve.request import Request, SamplingParams

Drawn = tuple[int, TokenLogprobs | None]
"""A token, and its log probabilities where the request asks for them."""


def make_generator(params: SamplingParams, device: torch.device) -> torch.Generator | None:
    """A generator of its own for a request that draws, so that its text does not depend on its neighbours."""
    if greedy(params.temperature):
        return None
    seed = params.seed if params.seed is not None else secrets.randbits(63)
    return torch.Generator(device).manual_seed(seed)


def sample_rows(logits_RV: Tensor, requests: Sequence[Request]) -> list[Drawn | Exception]:
    """What each row gets, or what went wrong with it: a row that fails leaves the others as they are."""
    largest_R, best_R = logits_RV.max(-1)
    finite, best = largest_R.isfinite().tolist(), best_R.tolist()
    return [
        _attempt(logits_RV[row : row + 1], request, best[row]) if finite[row] else LogitsError(NOT_FINITE)
        for row, request in enumerate(requests)
    ]


def _attempt(logits_1V: Tensor, request: Request, best: int) -> Drawn | Exception:
    try:
        return sample_row(logits_1V, request, best)
    except Exception as failure:
        return failure


def sample_row(logits_1V: Tensor, request: Request, best: int) -> Drawn:
    """One row's token, `best` being the most likely one. Log probabilities are the model's: before temperature, top_k
    and top_p."""
    params, token = request.params, best
    if not greedy(params.temperature):
        token = int(sample(logits_1V, params.temperature, params.top_p, params.top_k, request.generator))
    if params.logprobs is None:
        return token, None
    return token, token_logprobs(logits_1V[0], token, params.logprobs)
