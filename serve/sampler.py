"""Chooses the next token of every row together, each by its own options and random numbers."""

import secrets
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from attnzoo.models.logit_changes import LogitChanges
from attnzoo.models.row_sampling import Change, Chosen, RowWish, choose_rows, row_wish
from attnzoo.models.sampling import EDITED_NOT_FINITE, NOT_FINITE, greedy
from serve.faults import EditsError, LogitsError, log
from serve.request import Alone, Request, SamplingParams

Drawn = Chosen
"""A token id, and its log probabilities if the request wants them."""


def make_generator(params: SamplingParams, device: torch.device) -> torch.Generator | None:
    """The random generator of a request, so that its text does not depend on other requests; None for greedy ones."""
    if greedy(params.temperature):
        return None
    seed = params.seed if params.seed is not None else secrets.randbits(63)
    return torch.Generator(device).manual_seed(seed)


def make_changes(
    params: SamplingParams, prompt: Sequence[int], vocab_size: int, device: torch.device
) -> LogitChanges | None:
    """What changes the logits of a request; None: nothing does."""
    return LogitChanges.of(params, prompt, vocab_size, device, bars=params.min_tokens > 0)


def sample_rows(logits_RV: Tensor, requests: Sequence[Request]) -> list[Drawn | Exception]:
    """The token of each row of logits_RV, or the row's error; a failing row does not affect the others. A greedy
    request may have several rows."""
    wishes = [_attempt_wish(request, logits_RV) for request in requests]
    found: list[Drawn | Exception | None] = [wish if isinstance(wish, Exception) else None for wish in wishes]
    able = {row: wish for row, wish in enumerate(wishes) if isinstance(wish, RowWish)}
    some_SV = logits_RV if len(able) == len(wishes) else logits_RV[list(able)]
    for row, one in zip(able, _choose(some_SV, list(able.values())), strict=True):
        found[row] = one
    return [_not_finite(request) if one is None else one for one, request in zip(found, requests, strict=True)]


def _choose(logits_RV: Tensor, wishes: Sequence[RowWish]) -> Sequence[Drawn | Exception | None]:
    """All rows together; where that fails, each alone, with the random numbers that it has drawn already."""
    try:
        return choose_rows(logits_RV, wishes)
    except Exception as failure:
        log("tokens could not be chosen together, and are chosen row by row", failure)
        return [_attempt_row(logits_RV[row : row + 1], wish) for row, wish in enumerate(wishes)]


def _attempt_row(logits_1V: Tensor, wish: RowWish) -> Drawn | Exception | None:
    try:
        return choose_rows(logits_1V, [wish])[0]
    except Exception as failure:
        return failure


def _attempt_wish(request: Request, logits_RV: Tensor) -> RowWish | Exception:
    try:
        return wish_of(request, logits_RV)
    except Exception as failure:
        return failure


def wish_of(request: Request, logits_RV: Tensor) -> RowWish:
    """What a request wants of a row; draws its random numbers."""
    return row_wish(request.params, logits_RV, request.generator, _change(request))


def _change(request: Request) -> Change | None:
    if request.changes is None:
        return None
    barred = () if request.may_end else tuple(request.ends)
    return partial(request.changes.apply, tokens=request.generated, barred=barred)


def _not_finite(request: Request) -> LogitsError:
    edited = isinstance(request.group, Alone) and request.group.run.plan.changes
    return EditsError(f"attention.edits: {EDITED_NOT_FINITE}") if edited else LogitsError(NOT_FINITE)
