"""torch's fused attention; a mask is built only where positions ask for one."""

import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.masks import causal_mask


def sdpa_torch(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    query_positions_BT: Tensor | None,
    key_positions_BKS: Tensor | None,
    scale: float,
) -> Tensor:
    grouped = q_BNTH.shape[1] != k_BKSH.shape[1]
    if query_positions_BT is None or key_positions_BKS is None:
        return F.scaled_dot_product_attention(q_BNTH, k_BKSH, v_BKSH, is_causal=True, scale=scale, enable_gqa=grouped)
    mask_BNTS = per_query_head(causal_mask(query_positions_BT, key_positions_BKS), q_BNTH.shape[1])
    return F.scaled_dot_product_attention(q_BNTH, k_BKSH, v_BKSH, attn_mask=mask_BNTS, scale=scale, enable_gqa=grouped)


def per_query_head(mask_BKTS: Tensor, heads: int) -> Tensor:
    """A mask per kv head (or one for all) as a mask per query head (or one for all)."""
    kept = mask_BKTS.shape[1]
    return mask_BKTS if kept in (1, heads) else mask_BKTS.repeat_interleave(heads // kept, dim=1)
