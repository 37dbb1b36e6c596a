"""torch's fused attention where its own masks say all, row blocks for other masks, a dense mask in streaming and for
pairs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.common.masks import Mask
from attnzoo.ops.common.negligible import attention_of_peaked, may_be_peaked, product_bound, without_negligible
from attnzoo.ops.common.products import with_keys, with_values
from attnzoo.ops.common.row_blocks import row_block_attention
from attnzoo.types import accumulation_dtype


def sdpa_torch(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: Mask, scale: float) -> Tensor:
    if in_row_blocks(mask):
        # Of these two kinds torch's fused attention needs no mask, or one number a key.
        if (mask.plain or not mask.causal) and not peaked_backward(q_BNTH, k_BKSH, v_BKSH, scale=scale):
            return _fused(q_BNTH, k_BKSH, v_BKSH, mask, scale)
        return row_block_attention(q_BNTH, k_BKSH, v_BKSH, None, mask, scale)
    if q_BNTH.shape[2] == 1 and mask.pairs is None:
        return _one_query(q_BNTH, k_BKSH, v_BKSH, mask, scale)
    return masked_attention(q_BNTH, k_BKSH, v_BKSH, None, mask, scale)


def in_row_blocks(mask: Mask) -> bool:
    """Whether blocks of rows can compute a mask: the parallel form, but for pairs, which take memory for all of them
    anyway."""
    return mask.parallel and mask.pairs is None


def _fused(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: Mask, scale: float) -> Tensor:
    if mask.keys_BS is not None:
        return masked_attention(q_BNTH, k_BKSH, v_BKSH, None, mask, scale)
    grouped = q_BNTH.shape[1] != k_BKSH.shape[1]
    return F.scaled_dot_product_attention(
        q_BNTH, k_BKSH, v_BKSH, is_causal=mask.causal, scale=scale, enable_gqa=grouped
    )


def masked_attention(
    q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, bias_BNTS: Tensor | None, mask: Mask, scale: float
) -> Tensor:
    """Attention under a dense mask, with a term added to the scores: torch's fused form, unless its backward would meet
    denormal numbers. A query that sees nothing gets zeros."""
    seen_BKTS, empty_BKT1 = mask.opened(q_BNTH.shape[2], k_BKSH.shape[2], q_BNTH.device)
    return opened_attention(q_BNTH, k_BKSH, v_BKSH, bias_BNTS, seen_BKTS, empty_BKT1, scale)


def opened_attention(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    bias_BNTS: Tensor | None,
    seen_BKTS: Tensor,
    empty_BKT1: Tensor | None,
    scale: float,
) -> Tensor:
    """`masked_attention` under what `Mask.opened` returns; K may be the query heads. The bias is finite."""
    heads, kv_heads = q_BNTH.shape[1], k_BKSH.shape[1]
    seen_BNTS = per_query_head(seen_BKTS, heads)
    if peaked_backward(q_BNTH, k_BKSH, v_BKSH, bias_BNTS, scale=scale):
        k_BNSH, v_BNSH = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k_BKSH, v_BKSH))
        out = attention_of_peaked(q_BNTH, k_BNSH, v_BNSH, bias_BNTS, ~seen_BNTS, scale)
    else:
        added = seen_BNTS if bias_BNTS is None else bias_BNTS.masked_fill(~seen_BNTS, float("-inf"))
        out = F.scaled_dot_product_attention(
            q_BNTH, k_BKSH, v_BKSH, attn_mask=added, scale=scale, enable_gqa=heads != kv_heads
        )
    return out if empty_BKT1 is None else out.masked_fill(per_query_head(empty_BKT1, heads), 0.0)


def peaked_backward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, scale: float) -> bool:
    """Whether a backward pass will follow in which torch's fused attention may multiply by denormal weights.

    Its forward pass drops them by itself; its backward pass on a CPU took nine times as long.
    """
    tensors = [x for x in (q, k, v, bias) if x is not None]
    if q.device.type != "cpu" or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    if not any(x.requires_grad for x in tensors) or not q.numel() or not k.numel():
        return False
    with torch.no_grad():
        dtype = accumulation_dtype(q.dtype)
        bounds = [product_bound(q.to(dtype), k.to(dtype)) * scale]
        return may_be_peaked(*bounds, *([] if bias is None else [bias.abs().amax().to(dtype)]))


COPIED_BYTES = 2 << 20
"""Keys in half precision of this many bytes take part in one product. torch copies those of a cache with room to spare,
and the copy of few sequences is read again before it has left the processor's cache."""


def _one_query(q_BN1H: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: Mask, scale: float) -> Tensor:
    """A decode step: the queries that share a kv head are rows of one product, so that keys are read once for all.

    The fused kernel does that when it is told that they are consecutive queries; with several sequences products are
    faster, if keys stand on the left (on the right, in half precision, they would be transposed in memory first).
    """
    batch, heads, _, head_dim = q_BN1H.shape
    q_BKGH = q_BN1H.reshape(batch, k_BKSH.shape[1], -1, head_dim)
    if batch == 1:
        bias_BK1S, empty_BK11 = mask.bias(1, k_BKSH.shape[2], q_BN1H.device, q_BN1H.dtype)
        o_BKGH = F.scaled_dot_product_attention(q_BKGH, k_BKSH, v_BKSH, attn_mask=bias_BK1S, scale=scale)
        o_BKGH = o_BKGH if empty_BK11 is None else o_BKGH.masked_fill(empty_BK11, 0.0)
        return o_BKGH.reshape(batch, heads, 1, -1)
    sums = accumulation_dtype(q_BN1H.dtype)
    bias_BK1S, empty_BK11 = mask.bias(1, k_BKSH.shape[2], q_BN1H.device, sums)
    # In other dtypes torch copies nothing, and the kv heads of all sequences fill the threads better than those of one.
    whole = k_BKSH.itemsize > 2 or torch.compiler.is_compiling()
    rows = batch if whole else max(1, COPIED_BYTES // (k_BKSH[0].numel() * k_BKSH.itemsize))
    parts = [x.split(rows) for x in (q_BKGH, k_BKSH, v_BKSH, bias_BK1S.expand(batch, -1, -1, -1))]
    o_BKGH = torch.cat([_products(q, k, v, bias, scale) for q, k, v, bias in zip(*parts, strict=True)])
    o_BKGH = o_BKGH if empty_BK11 is None else o_BKGH.masked_fill(empty_BK11, 0.0)
    return o_BKGH.reshape(batch, heads, 1, -1)


def _products(q_BKGH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, bias_BK1S: Tensor, scale: float) -> Tensor:
    weights_BKGS = torch.add(bias_BK1S, with_keys(q_BKGH, k_BKSH), alpha=scale).softmax(-1)
    return with_values(without_negligible(weights_BKGS), v_BKSH).to(v_BKSH.dtype)


def per_query_head(mask_BKTS: Tensor, heads: int) -> Tensor:
    """A mask per kv head (or one for all) as a mask per query head (or one for all)."""
    kept = mask_BKTS.shape[1]
    return mask_BKTS if kept in (1, heads) else mask_BKTS.repeat_interleave(heads // kept, dim=1)
