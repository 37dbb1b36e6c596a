"""The parallel form in blocks of rows; in streaming, the relative terms as one additive bias for torch's attention."""

import torch
from torch import Tensor

from attnzoo.ops.common.masks import CausalMask
from attnzoo.ops.common.row_blocks import Tables, row_block_attention
from attnzoo.ops.sdpa.torch import masked_attention, per_query_head


def relative_sdpa_torch(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    content_bias_NH: Tensor,
    table_NPH: Tensor,
    table_bias_NP: Tensor,
    mask: CausalMask,
    scale: float,
) -> Tensor:
    if mask.parallel:
        tables = Tables(content_bias_NH, table_NPH, table_bias_NP)
        return row_block_attention(q_BNTH, k_BKSH, v_BKSH, tables, mask, scale)
    tokens, heads = q_BNTH.shape[2], q_BNTH.shape[1]
    bias_BNTS = streamed_bias(q_BNTH, table_NPH, table_bias_NP, mask, scale)
    visible_BNTS = per_query_head(mask.visible(tokens, q_BNTH.device), heads)
    return masked_attention(q_BNTH + content_bias_NH[:, None], k_BKSH, v_BKSH, bias_BNTS, visible_BNTS, scale)


def streamed_bias(q_BNTH: Tensor, table_NPH: Tensor, table_bias_NP: Tensor, mask: CausalMask, scale: float) -> Tensor:
    """scale * (q_i . R[i-j] + S[i-j]) for every query and key: [B, N, T, S]."""
    queries_BT, keys_BKS = mask.positions(q_BNTH.shape[2], q_BNTH.device)
    distance_BNTS = per_query_head(queries_BT[:, None, :, None] - keys_BKS[:, :, None, :], q_BNTH.shape[1])
    return _gathered_bias(q_BNTH * scale, table_NPH, table_bias_NP * scale, distance_BNTS)


def _gathered_bias(q_BNTH: Tensor, table_NPH: Tensor, table_bias_NP: Tensor, distance_BNTS: Tensor) -> Tensor:
    """q_i . R[d] + S[d] at any distances; those of hidden keys are clamped into the table and masked later."""
    batch, heads, tokens, head_dim = q_BNTH.shape
    rows = min(max(int(distance_BNTS.max()) + 1, 1), table_bias_NP.shape[-1])
    index = distance_BNTS.clamp(0, rows - 1).expand(batch, heads, tokens, -1)
    if table_NPH.shape[-1] == 0:  # distance adds a bias, whatever the query
        return table_bias_NP[:, None].expand(batch, heads, tokens, -1).gather(-1, index)
    # One product a head for the whole batch: a broadcast over the batch would copy the table.
    flat_NLH = q_BNTH.transpose(0, 1).reshape(heads, batch * tokens, head_dim)
    logits_NLP = torch.baddbmm(table_bias_NP[:, None, :rows], flat_NLH, table_NPH[:, :rows].mT)
    logits_BNTP = logits_NLP.view(heads, batch, tokens, rows).transpose(0, 1)
    return logits_BNTP.gather(-1, index)
