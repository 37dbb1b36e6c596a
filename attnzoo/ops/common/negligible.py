"""Sets weights that are too small to matter to exactly zero, before anything is multiplied by them.

A softmax over peaked scores, or a power of a small decay, leaves denormal numbers (below 1.2e-38 in float32). They
change nothing in a sum beside weights of order one, and a CPU may need a hundred cycles for each product with one: on
an Intel Xeon a backward pass of relative attention took 19 times as long. Weights are relative to the largest one, so
that those below `smallest_weight` are lost in the rounding of any sum; those that are kept are so large that products
of two are not denormal either. GPUs compute with denormals at full speed, so only CPU tensors are changed.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_softmax = torch.ops.aten._softmax


def smallest_weight(dtype: torch.dtype) -> float:
    """Weights below this become 0: the root of the smallest normal number, 1.1e-19 in float32, 1.5e-154 in float64."""
    return math.sqrt(torch.finfo(dtype).tiny)


def without_negligible(weights: Tensor) -> Tensor:
    """Weights of at least float32, none negative, whose largest are of order one; negligible ones become 0."""
    if weights.device.type != "cpu":
        return weights
    return F.threshold(weights, smallest_weight(weights.dtype), 0.0)


def may_be_peaked(*bounds: Tensor) -> bool:
    """Whether scores between plus and minus the sum of `bounds` can have a negligible weight in their softmax."""
    reach = 2.0 * float(sum(bound.double() for bound in bounds))
    return not reach < -math.log(smallest_weight(bounds[0].dtype))


def product_bound(rows_PRH: Tensor, columns_PSH: Tensor) -> Tensor:
    """An upper bound on the entries of rows . columns^T (Cauchy and Schwarz)."""
    return _longest(rows_PRH) * _longest(columns_PSH)


def _longest(x: Tensor) -> Tensor:
    if not x.numel():
        return x.new_zeros(())
    return torch.linalg.vector_norm(x, dim=-1).amax()


def softmax_of_peaked_(scores: Tensor) -> Tensor:
    """Softmax over the last axis, in place, of scores in at least float32: weights that are not negligible have the
    same bits as torch's. Scores may be -inf, but not all of a row."""
    scores.sub_(scores.amax(-1, keepdim=True))
    F.threshold(scores, math.log(smallest_weight(scores.dtype)), -math.inf, inplace=True)
    out: Tensor = _softmax.out(scores, -1, False, out=scores)
    return out


def attention_of_peaked(
    q_BNTH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor, bias_BNTS: Tensor | None, hidden_BNTS: Tensor | None, scale: float
) -> Tensor:
    """Attention with whole score matrices, differentiable, where torch's fused backward would meet denormal weights.

    Heads are those of the queries. A query that sees nothing gets zeros.
    """
    scores = (q_BNTH * scale) @ k_BNSH.mT
    if not scores.shape[-1]:
        return scores @ v_BNSH
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if bias_BNTS is not None:
        scores = scores + bias_BNTS
    lowest = torch.finfo(scores.dtype).min
    if hidden_BNTS is not None:
        scores = scores.masked_fill(hidden_BNTS, lowest)
    with torch.no_grad():
        floor = scores.amax(-1, keepdim=True) + math.log(smallest_weight(scores.dtype))
        dropped = scores < floor if hidden_BNTS is None else (scores < floor) | hidden_BNTS
    # Filled before the softmax, so that it makes no denormals, and after it, for rows that see nothing.
    weights = scores.masked_fill(dropped, lowest).softmax(-1).masked_fill(dropped, 0.0)
    return weights.to(v_BNSH.dtype) @ v_BNSH
