"""torch's fused attention where causality is all there is, row blocks for other masks, a dense mask in streaming."""

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.masks import CausalMask
from attnzoo.ops.products import with_keys, with_values
from attnzoo.ops.row_blocks import row_block_attention
from attnzoo.types import accumulation_dtype


def sdpa_torch(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: CausalMask, scale: float) -> Tensor:
    grouped = q_BNTH.shape[1] != k_BKSH.shape[1]
    if mask.plain:
        return F.scaled_dot_product_attention(q_BNTH, k_BKSH, v_BKSH, is_causal=True, scale=scale, enable_gqa=grouped)
    if mask.parallel:
        return row_block_attention(q_BNTH, k_BKSH, v_BKSH, None, mask, scale)
    if q_BNTH.shape[2] == 1:
        return _one_query(q_BNTH, k_BKSH, v_BKSH, mask, scale)
    visible_BNTS = per_query_head(mask.visible(q_BNTH.shape[2], q_BNTH.device), q_BNTH.shape[1])
    return F.scaled_dot_product_attention(
        q_BNTH, k_BKSH, v_BKSH, attn_mask=visible_BNTS, scale=scale, enable_gqa=grouped
    )


COPIED_BYTES = 2 << 20
"""Keys in half precision of this many bytes take part in one product. torch copies those of a cache with room to spare,
and the copy of few sequences is read again before it has left the processor's cache."""


def _one_query(q_BN1H: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: CausalMask, scale: float) -> Tensor:
    """A decode step: the queries that share a kv head are rows of one product, so that keys are read once for all.

    The fused kernel does that when it is told that they are consecutive queries; with several sequences products are
    faster, if keys stand on the left (on the right, in half precision, they would be transposed in memory first).
    """
    batch, heads, _, head_dim = q_BN1H.shape
    q_BKGH = q_BN1H.reshape(batch, k_BKSH.shape[1], -1, head_dim)
    if batch == 1:
        bias_BK1S = mask.bias(1, q_BN1H.device, q_BN1H.dtype)
        o_BKGH = F.scaled_dot_product_attention(q_BKGH, k_BKSH, v_BKSH, attn_mask=bias_BK1S, scale=scale)
        return o_BKGH.reshape(batch, heads, 1, head_dim)
    bias_BK1S = mask.bias(1, q_BN1H.device, accumulation_dtype(q_BN1H.dtype)).expand(batch, -1, -1, -1)
    # In other dtypes torch copies nothing, and the kv heads of all sequences fill the threads better than those of one.
    whole = k_BKSH.itemsize > 2 or torch.compiler.is_compiling()
    rows = batch if whole else max(1, COPIED_BYTES // (k_BKSH[0].numel() * k_BKSH.itemsize))
    parts = [x.split(rows) for x in (q_BKGH, k_BKSH, v_BKSH, bias_BK1S)]
    o_BKGH = torch.cat([_products(q, k, v, bias, scale) for q, k, v, bias in zip(*parts, strict=True)])
    return o_BKGH.reshape(batch, heads, 1, head_dim)


def _products(q_BKGH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, bias_BK1S: Tensor, scale: float) -> Tensor:
    weights_BKGS = torch.add(bias_BK1S, with_keys(q_BKGH, k_BKSH), alpha=scale).softmax(-1)
    return with_values(weights_BKGS, v_BKSH).to(v_BKSH.dtype)


def per_query_head(mask_BKTS: Tensor, heads: int) -> Tensor:
    """A mask per kv head (or one for all) as a mask per query head (or one for all)."""
    kept = mask_BKTS.shape[1]
    return mask_BKTS if kept in (1, heads) else mask_BKTS.repeat_interleave(heads // kept, dim=1)
