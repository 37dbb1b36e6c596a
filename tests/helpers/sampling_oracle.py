"""Sampling of one row at a time by `torch.multinomial`, as this project did it first: what rows drawn together must
repeat."""

import torch
from torch import Tensor

from attnzoo.models import TokenLogprobs
from attnzoo.models.sampling import FLAT, greedy


def kept_logits(logits_BV: Tensor, top_k: int, top_p: float) -> Tensor:
    """logits_BV with -inf for what top_k, and then top_p, leave out; both by a whole sort, ties by their index."""
    if 0 < top_k < logits_BV.shape[-1]:
        smallest_B1 = logits_BV.topk(top_k, dim=-1).values[..., -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, float("-inf"))
    if top_p < 1.0:
        ordered_BV, index_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        mass_BV = ordered_BV.softmax(-1)
        drop_BV = mass_BV.cumsum(-1) - mass_BV >= top_p
        drop_BV[..., 0] = False
        logits_BV = logits_BV.masked_fill(torch.zeros_like(drop_BV).scatter(-1, index_BV, drop_BV), float("-inf"))
    return logits_BV


def drawn_token(
    logits_1V: Tensor, temperature: float, top_p: float, top_k: int, generator: torch.Generator | None
) -> int:
    """The token of one row."""
    largest_11, best_11 = logits_1V.max(-1, keepdim=True)
    if greedy(temperature):
        return int(best_11)
    scaled_1V = (logits_1V.float() - largest_11.float()) / float(min(temperature, FLAT))
    return int(torch.multinomial(kept_logits(scaled_1V, top_k, top_p).softmax(-1), 1, generator=generator))


def logprobs_of(logits_V: Tensor, token: int, alternatives: int) -> TokenLogprobs:
    """`TokenLogprobs` of one row's token."""
    values_V = logits_V.float().log_softmax(-1)
    best = values_V.topk(min(alternatives, len(values_V)))
    top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return TokenLogprobs(token, float(values_V[token]), tuple(top))
