"""Scaled dot-product attention over logical positions, causal, with grouped kv heads.

o_i = sum_j softmax_j(scale * q_i . k_j) v_j over keys j with 0 <= position_j <= position_i
(Vaswani et al. 2017, arXiv 1706.03762, eq. 1; grouped kv heads: Ainslie et al. 2023, arXiv 2305.13245).
"""

from torch import Tensor

from attnzoo.ops.impl import Impl, choose
from attnzoo.ops.masks import check_heads
from attnzoo.ops.sdpa.reference import sdpa_reference
from attnzoo.ops.sdpa.torch import sdpa_torch


def sdpa(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    *,
    query_positions_BT: Tensor | None = None,
    key_positions_BKS: Tensor | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Returns o_BNTH.

    Positions None means the parallel form: T == S, token t at position t. Otherwise both are int64 logical
    positions; a key position below 0 marks an entry that holds nothing. `scale` defaults to 1/sqrt(H).
    A query that may look at no key at all gets an undefined row.
    Raises ValueError when shapes do not fit or `impl` is unknown.
    """
    check_heads(q_BNTH, k_BKSH, v_BKSH)
    scale = q_BNTH.shape[-1] ** -0.5 if scale is None else scale
    run = choose("sdpa", impl, {"reference": sdpa_reference, "torch": sdpa_torch})
    out: Tensor = run(q_BNTH, k_BKSH, v_BKSH, query_positions_BT, key_positions_BKS, scale)
    return out


__all__ = ["sdpa"]
