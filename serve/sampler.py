"""Chooses the next token of every row: greedy rows together, sampled rows each with its own generator."""

import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from attnzoo.models.sampling import (
    EDITED_NOT_FINITE,
    NOT_FINITE,
    TokenLogprobs,
    best_tokens,
    greedy,
    sample,
    token_logprobs,
)
from serve.faults import EditsError, LogitsError
from serve.request import Alone, Request, SamplingParams

Drawn = tuple[int, TokenLogprobs | None]
"""A token id, and its log probabilities if the request wants them."""


def make_generator(params: SamplingParams, device: torch.device) -> torch.Generator | None:
    """The random generator of a request, so that its text does not depend on other requests; None for greedy ones."""
    if greedy(params.temperature):
        return None
    seed = params.seed if params.seed is not None else secrets.randbits(63)
    return torch.Generator(device).manual_seed(seed)


def sample_rows(logits_RV: Tensor, requests: Sequence[Request]) -> list[Drawn | Exception]:
    """The token of each row of logits_RV, or the row's error; a failing row does not affect the others."""
    return [
        _not_finite(request) if best is None else _attempt(logits_RV[row : row + 1], request, best)
        for row, (request, best) in enumerate(zip(requests, best_tokens(logits_RV), strict=True))
    ]


def _not_finite(request: Request) -> LogitsError:
    edited = isinstance(request.group, Alone) and request.group.run.plan.changes
    return EditsError(f"attention.edits: {EDITED_NOT_FINITE}") if edited else LogitsError(NOT_FINITE)


def _attempt(logits_1V: Tensor, request: Request, best: int) -> Drawn | Exception:
    try:
        return sample_row(logits_1V, request, best)
    except Exception as failure:
        return failure


def sample_row(logits_1V: Tensor, request: Request, best: int) -> Drawn:
    """The token of one row. best: its most likely token. Log probabilities are the model's, before temperature, top_k
    and top_p."""
    params, token = request.params, best
    if not greedy(params.temperature):
        token = int(sample(logits_1V, params.temperature, params.top_p, params.top_k, request.generator))
    if params.logprobs is None:
        return token, None
    return token, token_logprobs(logits_1V[0], token, params.logprobs)
