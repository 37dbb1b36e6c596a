"""Scaled dot-product attention with grouped kv heads, under any mask.

o_i = sum_j softmax_j(scale * q_i . k_j) v_j over the keys j that the mask leaves visible
(Vaswani et al. 2017, arXiv 1706.03762, eq. 1; grouped kv heads: Ainslie et al. 2023, arXiv 2305.13245).
"""

from torch import Tensor

from attnzoo.ops.common.impl import Impl, choose, lazily
from attnzoo.ops.common.masks import CAUSAL, Mask, check_heads, check_mask
from attnzoo.ops.sdpa.reference import sdpa_reference
from attnzoo.ops.sdpa.torch import sdpa_torch

IMPLEMENTATIONS = {
    "reference": sdpa_reference,
    "torch": sdpa_torch,
    "triton": lazily("attnzoo.ops.sdpa.triton", "sdpa_triton"),
}


def sdpa(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    *,
    mask: Mask = CAUSAL,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Returns o_BNTH. `scale` defaults to 1/sqrt(H).

    A query that may look at no key at all gets zeros, and gives no gradient.
    Raises ValueError when shapes do not fit or `impl` is unknown or cannot run here.
    """
    check_heads(q_BNTH, k_BKSH, v_BKSH)
    check_mask(mask, q_BNTH, k_BKSH)
    run = choose("sdpa", impl, IMPLEMENTATIONS, q_BNTH)
    out: Tensor = run(q_BNTH, k_BKSH, v_BKSH, mask, q_BNTH.shape[-1] ** -0.5 if scale is None else scale)
    return out


__all__ = ["sdpa"]
