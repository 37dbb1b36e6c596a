"""Attention with free tables of relative position.

A_ij = (q_i + u) . k_j + q_i . R[i-j] + S[i-j],  o_i = sum_j softmax_j(scale * A_ij) v_j
(the table form of Transformer-XL's relative attention, arXiv 1901.02860; used by RCMHA, arXiv 2308.03429).
Distances beyond the table use its first or last row; keys after the query (i-j < 0) are asked for by masks that show
them, and need rows of their own.
"""

from torch import Tensor

from attnzoo.ops.common.impl import Impl, choose, lazily
from attnzoo.ops.common.masks import CAUSAL, Mask, check_future_rows, check_heads, check_mask
from attnzoo.ops.common.tables import Tables
from attnzoo.ops.relative_sdpa.reference import relative_sdpa_reference
from attnzoo.ops.relative_sdpa.torch import relative_sdpa_torch

IMPLEMENTATIONS = {
    "reference": relative_sdpa_reference,
    "torch": relative_sdpa_torch,
    "triton": lazily("attnzoo.ops.relative_sdpa.triton", "relative_sdpa_triton"),
}


def relative_sdpa(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    *,
    content_bias_NH: Tensor,
    table_NPH: Tensor,
    table_bias_NP: Tensor,
    future_rows: int = 0,
    mask: Mask = CAUSAL,
    impl: Impl = "auto",
) -> Tensor:
    """Returns o_BNTH; content_bias is u, table is R, table_bias is S above; the scale is 1/sqrt(H).

    Row p of the tables is that of the distance p - future_rows: the first `future_rows` are for keys after the query.
    Memory of the parallel form is linear in T, forward and backward, but for pairs. Gradients of the tables are
    deterministic. A query that sees no key gets zeros. Raises ValueError when shapes do not fit, the mask shows keys
    after the query and future_rows is 0, or `impl` is unknown or cannot run here.
    """
    check_heads(q_BNTH, k_BKSH, v_BKSH)
    check_mask(mask, q_BNTH, k_BKSH)
    heads, head_dim = q_BNTH.shape[1], q_BNTH.shape[3]
    rows = table_bias_NP.shape[-1]
    if content_bias_NH.shape != (heads, head_dim) or table_NPH.shape != (heads, rows, head_dim):
        raise ValueError(
            f"content_bias {tuple(content_bias_NH.shape)}, table {tuple(table_NPH.shape)} and table_bias "
            f"{tuple(table_bias_NP.shape)} do not fit {heads} heads of {head_dim}: they must be "
            f"[{heads}, {head_dim}], [{heads}, P, {head_dim}] and [{heads}, P]"
        )
    check_future_rows(mask, future_rows, rows)
    run = choose("relative_sdpa", impl, IMPLEMENTATIONS, q_BNTH)
    tables = Tables(content_bias_NH, table_NPH, table_bias_NP, future_rows)
    out: Tensor = run(q_BNTH, k_BKSH, v_BKSH, tables, mask, head_dim**-0.5)
    return out


__all__ = ["relative_sdpa"]
