"""How many tokens each layer keeps.

D2O (Wan et al., arXiv 2406.13035, eq. 3-4): a layer whose attention is spread evenly needs more tokens than one whose
attention is dense: F_l = Var_j(sum_i A[i, j]), alpha_l = L * softmax(-F)_l, S_l = alpha_l * S.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def asked_tokens(lengths_B: Tensor, keep_ratio: float | None, max_tokens: int | None, least: int) -> Tensor:
    """tokens_B to keep of each sequence: max_tokens, or keep_ratio of its length rounded up and at least `least`."""
    if max_tokens is not None:
        return torch.full_like(lengths_B, max_tokens)
    assert keep_ratio is not None
    # Rounded first, as 0.2 * 35 is a little more than 7.
    return (lengths_B.double() * keep_ratio).round(decimals=6).ceil().long().clamp(min=least)


def moments(accumulated_BKS: Tensor, held_BKS: Tensor) -> Tensor:
    """moments_BK3 (float64): count, sum and sum of squares of the entries where held_BKS is True."""
    x = accumulated_BKS.double().masked_fill(~held_BKS, 0.0)
    return torch.stack([held_BKS.expand_as(x).sum(-1).double(), x.sum(-1), x.square().sum(-1)], dim=-1)


def variance(moments_BK3: Tensor) -> Tensor:
    """variance_BK of the entries that `moments` counted."""
    count, total, squares = moments_BK3.unbind(-1)
    count = count.clamp(min=1)
    return (squares / count - (total / count).square()).clamp(min=0)


def layer_weights(variances: Sequence[Tensor], per_head: bool) -> Tensor:
    """alpha_LB, which sums to L over the L layers, from variance_BK of each layer (K may differ between layers).
    Variances are first scaled to 0..1: over the layers as in the paper, or with `per_head` over the heads of each layer
    and then averaged, as in the authors' code."""
    if per_head:
        spread_LB = torch.stack([_scaled(layer_BK, -1).mean(-1) for layer_BK in variances])
    else:
        spread_LB = _scaled(torch.stack([layer_BK.mean(-1) for layer_BK in variances]), 0)
    return len(spread_LB) * (-spread_LB).softmax(0)


def _scaled(x: Tensor, dim: int) -> Tensor:
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    return (x - low) / (high - low).clamp(min=torch.finfo(x.dtype).tiny)


def allocate(weights_LB: Tensor, total_B: Tensor, low_B: Tensor, high_B: Tensor) -> Tensor:
    """budgets_LB (int64), proportional to the weights, within low_B..high_B, with sum total_B or the nearest sum that
    the bounds allow. What one layer cannot take goes to the others."""
    layers = len(weights_LB)
    low_B = torch.minimum(low_B, high_B)
    total_B = torch.maximum(torch.minimum(total_B, layers * high_B), layers * low_B)
    weights_LB = weights_LB.double().clamp(min=1e-12)
    low, high, total = low_B.double(), high_B.double(), total_B.double()
    # Bisection: find the level at which the clamped budgets, which grow with it, sum to the total.
    below, above = torch.zeros_like(total), high / weights_LB.amin(0)
    for _ in range(100):
        level = (below + above) / 2
        short = (level * weights_LB).clamp(min=low, max=high).sum(0) < total
        below, above = torch.where(short, level, below), torch.where(short, above, level)
    exact_LB = (above * weights_LB).clamp(min=low, max=high)
    floor_LB = (exact_LB + 1e-6).floor()
    missing_B = total - floor_LB.sum(0)
    # Largest remainders first, among the layers that have room.
    rest_LB = (exact_LB - floor_LB).masked_fill(floor_LB >= high, -1.0)
    rank_LB = rest_LB.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
    return (floor_LB + (rank_LB < missing_B)).long()
