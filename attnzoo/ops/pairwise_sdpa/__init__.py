"""Attention with a bias that is any function of positions and head.

o_i = sum_j softmax_j(scale * q_i . k_j + b(i, j, head)) v_j: the bias is added as it is, after the scale, and b = -inf
hides the pair. Where it depends on i - j alone, `biased_sdpa` needs no memory of pairs, and has GPU kernels.
"""

from torch import Tensor

from attnzoo.ops.common.impl import Impl, choose
from attnzoo.ops.common.masks import CAUSAL, Mask, check_heads, check_mask
from attnzoo.ops.common.pair_bias import PairBias
from attnzoo.ops.pairwise_sdpa.reference import pairwise_sdpa_reference
from attnzoo.ops.pairwise_sdpa.torch import pairwise_sdpa_torch

IMPLEMENTATIONS = {"reference": pairwise_sdpa_reference, "torch": pairwise_sdpa_torch}


def pairwise_sdpa(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    *,
    bias: PairBias,
    mask: Mask = CAUSAL,
    impl: Impl = "auto",
) -> Tensor:
    """Returns o_BNTH; the scale is 1/sqrt(H).

    The bias of a block of 128 queries exists at once, for all keys that they see and all heads; the backward pass
    computes it again, block by block. A query that sees no key, for the mask or for the bias, gets zeros and gives no
    gradient. Raises ValueError when shapes do not fit, or `impl` is unknown or cannot run here.
    """
    check_heads(q_BNTH, k_BKSH, v_BKSH)
    check_mask(mask, q_BNTH, k_BKSH)
    if bias.heads != q_BNTH.shape[1]:
        raise ValueError(f"the bias is of {bias.heads} heads, and q has {q_BNTH.shape[1]}")
    run = choose("pairwise_sdpa", impl, IMPLEMENTATIONS, q_BNTH)
    out: Tensor = run(q_BNTH, k_BKSH, v_BKSH, bias, mask, q_BNTH.shape[3] ** -0.5)
    return out


__all__ = ["PairBias", "pairwise_sdpa"]
