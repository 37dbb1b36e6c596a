"""torch's fused attention where causality is all there is, row blocks for other masks, a dense mask in streaming."""

import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.masks import CausalMask
from attnzoo.ops.row_blocks import row_block_attention
from attnzoo.types import accumulation_dtype


def sdpa_torch(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: CausalMask, scale: float) -> Tensor:
    grouped = q_BNTH.shape[1] != k_BKSH.shape[1]
    if mask.plain:
        return F.scaled_dot_product_attention(q_BNTH, k_BKSH, v_BKSH, is_causal=True, scale=scale, enable_gqa=grouped)
    if mask.parallel:
        return row_block_attention(q_BNTH, k_BKSH, v_BKSH, None, mask, scale)
    if q_BNTH.shape[2] == 1:
        return _one_query(q_BNTH, k_BKSH, v_BKSH, mask.visible(1, q_BNTH.device), scale)
    visible_BNTS = per_query_head(mask.visible(q_BNTH.shape[2], q_BNTH.device), q_BNTH.shape[1])
    return F.scaled_dot_product_attention(
        q_BNTH, k_BKSH, v_BKSH, attn_mask=visible_BNTS, scale=scale, enable_gqa=grouped
    )


def _one_query(q_BN1H: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, visible_BK1S: Tensor, scale: float) -> Tensor:
    """A decode step: the queries that share a kv head are rows of one product.

    The fused kernel walks through keys once a query head, and for a single query it does so on one thread.
    """
    groups = q_BN1H.shape[1] // k_BKSH.shape[1]
    q_BKGH = q_BN1H.flatten(1, 2).unflatten(1, (-1, groups)) * scale
    scores_BKGS = (q_BKGH @ k_BKSH.mT).to(accumulation_dtype(q_BN1H.dtype))
    weights_BKGS = scores_BKGS.masked_fill(~visible_BK1S, float("-inf")).softmax(-1)
    return (weights_BKGS.to(v_BKSH.dtype) @ v_BKSH).flatten(1, 2).unsqueeze(2)


def per_query_head(mask_BKTS: Tensor, heads: int) -> Tensor:
    """A mask per kv head (or one for all) as a mask per query head (or one for all)."""
    kept = mask_BKTS.shape[1]
    return mask_BKTS if kept in (1, heads) else mask_BKTS.repeat_interleave(heads // kept, dim=1)
