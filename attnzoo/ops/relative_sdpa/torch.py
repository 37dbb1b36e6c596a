"""The relative terms as one additive bias, then torch's attention. Memory is quadratic in T."""

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.masks import causal_mask
from attnzoo.ops.sdpa.torch import per_query_head


def relative_sdpa_torch(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    content_bias_NH: Tensor,
    table_NPH: Tensor,
    table_bias_NP: Tensor,
    query_positions_BT: Tensor | None,
    key_positions_BKS: Tensor | None,
) -> Tensor:
    heads, head_dim = q_BNTH.shape[1], q_BNTH.shape[3]
    scale = head_dim**-0.5
    if query_positions_BT is None or key_positions_BKS is None:
        bias_BNTS = _aligned_bias(q_BNTH, table_NPH, table_bias_NP, scale)
    else:
        distance_BKTS = query_positions_BT[:, None, :, None] - key_positions_BKS[:, :, None, :]
        bias_BNTS = _gathered_bias(q_BNTH, table_NPH, table_bias_NP, per_query_head(distance_BKTS, heads), scale)
        mask_BNTS = per_query_head(causal_mask(query_positions_BT, key_positions_BKS), heads)
        bias_BNTS = bias_BNTS.masked_fill(~mask_BNTS, float("-inf"))
    return F.scaled_dot_product_attention(
        q_BNTH + content_bias_NH[:, None],
        k_BKSH,
        v_BKSH,
        attn_mask=bias_BNTS,
        scale=scale,
        enable_gqa=heads != k_BKSH.shape[1],
    )


def _distance_logits(q_BNTH: Tensor, table_NPH: Tensor, table_bias_NP: Tensor, scale: float) -> Tensor:
    """scale * (q_i . R[d] + S[d]) for every query and distance d: [B, N, T, P]."""
    return torch.matmul(q_BNTH * scale, table_NPH.mT) + (table_bias_NP * scale)[:, None]


def _aligned_bias(q_BNTH: Tensor, table_NPH: Tensor, table_bias_NP: Tensor, scale: float) -> Tensor:
    """bias_BNTT of the parallel form, -inf above the diagonal, by the shift of Transformer-XL (appendix B).

    With the columns ordered from the farthest distance (T-1) to 0, row i is right when moved left by T-1-i;
    one column of padding and a reshape do that for all rows at once. What wraps around from the next row
    lands exactly above the diagonal and is masked.
    """
    batch, heads, tokens, _ = q_BNTH.shape
    rows = torch.arange(tokens - 1, -1, -1, device=q_BNTH.device).clamp(max=table_bias_NP.shape[-1] - 1)
    logits_BNTT = _distance_logits(q_BNTH, table_NPH[:, rows], table_bias_NP[:, rows], scale)
    shifted = F.pad(logits_BNTT, (1, 0)).view(batch, heads, tokens + 1, tokens)[:, :, 1:]
    hidden_TT = torch.ones(tokens, tokens, dtype=torch.bool, device=q_BNTH.device).triu(1)
    return shifted.masked_fill(hidden_TT, float("-inf"))


def _gathered_bias(
    q_BNTH: Tensor, table_NPH: Tensor, table_bias_NP: Tensor, distance_BNTS: Tensor, scale: float
) -> Tensor:
    """bias_BNTS for any positions; distances of hidden keys are clamped into the table and masked later."""
    rows = min(int(distance_BNTS.max()) + 1, table_bias_NP.shape[-1])
    rows = max(rows, 1)
    logits_BNTP = _distance_logits(q_BNTH, table_NPH[:, :rows], table_bias_NP[:, :rows], scale)
    index = distance_BNTS.clamp(0, rows - 1).expand(*q_BNTH.shape[:3], -1)
    return logits_BNTP.gather(-1, index)
