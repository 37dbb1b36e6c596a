"""The parallel form in blocks of rows; else the relative terms as one additive bias for torch's attention."""

import torch
from torch import Tensor

from attnzoo.ops.common.masks import Mask
from attnzoo.ops.common.row_blocks import row_block_attention
from attnzoo.ops.common.tables import Tables
from attnzoo.ops.sdpa.torch import in_row_blocks, masked_attention, per_query_head


def relative_sdpa_torch(
    q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, tables: Tables, mask: Mask, scale: float
) -> Tensor:
    if in_row_blocks(mask):
        return row_block_attention(q_BNTH, k_BKSH, v_BKSH, tables, mask, scale)
    positions = mask.positions(q_BNTH.shape[2], k_BKSH.shape[2], q_BNTH.device)
    bias_BNTS = streamed_bias(q_BNTH, tables, positions, scale)
    content_BNTH = q_BNTH + tables.content_bias_NH[:, None]
    return masked_attention(content_BNTH, k_BKSH, v_BKSH, bias_BNTS, mask, scale)


def streamed_bias(q_BNTH: Tensor, tables: Tables, positions: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """scale * (q_i . R[i-j] + S[i-j]) for every query and key, [B, N, T, S], at `Mask.positions`."""
    queries_BT, keys_BKS = positions
    distance_BNTS = per_query_head(queries_BT[:, None, :, None] - keys_BKS[:, :, None, :], q_BNTH.shape[1])
    row_BNTS = distance_BNTS + tables.future_rows if tables.future_rows else distance_BNTS
    return _gathered_bias(q_BNTH * scale, tables.table_NPH, tables.table_bias_NP * scale, row_BNTS)


def _gathered_bias(q_BNTH: Tensor, table_NPH: Tensor, table_bias_NP: Tensor, row_BNTS: Tensor) -> Tensor:
    """q_i . R[p] + S[p] at any rows; those beyond the table, and those of hidden keys, which are masked later, are
    clamped into it."""
    batch, heads, tokens, head_dim = q_BNTH.shape
    farthest = int(row_BNTS.max()) if row_BNTS.numel() else 0
    rows = min(max(farthest + 1, 1), table_bias_NP.shape[-1])
    index = row_BNTS.clamp(0, rows - 1).expand(batch, heads, tokens, -1)
    if table_NPH.shape[-1] == 0:  # distance adds a bias, whatever the query
        return table_bias_NP[:, None].expand(batch, heads, tokens, -1).gather(-1, index)
    # One product a head for the whole batch: a broadcast over the batch would copy the table.
    flat_NLH = q_BNTH.transpose(0, 1).reshape(heads, batch * tokens, head_dim)
    logits_NLP = torch.baddbmm(table_bias_NP[:, None, :rows], flat_NLH, table_NPH[:, :rows].mT)
    logits_BNTP = logits_NLP.view(heads, batch, tokens, rows).transpose(0, 1)
    return logits_BNTP.gather(-1, index)
