"""torch's fused attention where causality is all there is, row blocks for other masks, a dense mask in streaming."""

import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.masks import CausalMask
from attnzoo.ops.row_blocks import row_block_attention


def sdpa_torch(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: CausalMask, scale: float) -> Tensor:
    grouped = q_BNTH.shape[1] != k_BKSH.shape[1]
    if mask.plain:
        return F.scaled_dot_product_attention(q_BNTH, k_BKSH, v_BKSH, is_causal=True, scale=scale, enable_gqa=grouped)
    if mask.parallel:
        return row_block_attention(q_BNTH, k_BKSH, v_BKSH, None, mask, scale)
    visible_BNTS = per_query_head(mask.visible(q_BNTH.shape[2], q_BNTH.device), q_BNTH.shape[1])
    return F.scaled_dot_product_attention(
        q_BNTH, k_BKSH, v_BKSH, attn_mask=visible_BNTS, scale=scale, enable_gqa=grouped
    )


def per_query_head(mask_BKTS: Tensor, heads: int) -> Tensor:
    """A mask per kv head (or one for all) as a mask per query head (or one for all)."""
    kept = mask_BKTS.shape[1]
    return mask_BKTS if kept in (1, heads) else mask_BKTS.repeat_interleave(heads // kept, dim=1)
