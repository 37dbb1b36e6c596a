"""Attention with a bias by distance.

o_i = sum_j softmax_j(scale * q_i . k_j + b[i-j]) v_j: the bias is added as it is, after the scale, as in ALiBi (arXiv
2108.12409), T5 (arXiv 1910.10683) and KERPLE (arXiv 2205.09921). Distances beyond the first and last one given use
those; keys after the query (i-j < 0) are asked for by masks that show them.
"""

from torch import Tensor

from attnzoo.ops.biased_sdpa.reference import biased_sdpa_reference
from attnzoo.ops.biased_sdpa.torch import biased_sdpa_torch
from attnzoo.ops.common.impl import Impl, choose, lazily
from attnzoo.ops.common.masks import CAUSAL, Mask, check_future_rows, check_heads, check_mask

IMPLEMENTATIONS = {
    "reference": biased_sdpa_reference,
    "torch": biased_sdpa_torch,
    "triton": lazily("attnzoo.ops.biased_sdpa.triton", "biased_sdpa_triton"),
}


def biased_sdpa(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    *,
    bias_NP: Tensor,
    future_rows: int = 0,
    mask: Mask = CAUSAL,
    impl: Impl = "auto",
) -> Tensor:
    """Returns o_BNTH; bias_NP is b above for every head, at distances -future_rows..P-1-future_rows; the scale is
    1/sqrt(H).

    Memory of the parallel form is linear in T, forward and backward, but for pairs. A query that sees no key gets
    zeros. Raises ValueError when shapes do not fit, the mask shows keys after the query and future_rows is 0, or `impl`
    is unknown or cannot run here.
    """
    check_heads(q_BNTH, k_BKSH, v_BKSH)
    check_mask(mask, q_BNTH, k_BKSH)
    heads, head_dim = q_BNTH.shape[1], q_BNTH.shape[3]
    if bias_NP.dim() != 2 or len(bias_NP) != heads or bias_NP.shape[1] < 1:
        raise ValueError(
            f"bias has shape {tuple(bias_NP.shape)}; it must be [heads, distances] = [{heads}, P], with P at least 1"
        )
    check_future_rows(mask, future_rows, bias_NP.shape[1])
    run = choose("biased_sdpa", impl, IMPLEMENTATIONS, q_BNTH)
    out: Tensor = run(q_BNTH, k_BKSH, v_BKSH, bias_NP, future_rows, mask, head_dim**-0.5)
    return out


__all__ = ["biased_sdpa"]
