"""torch's fused attention where causality is all there is, row blocks for other masks, a dense mask in streaming."""

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.common.masks import CausalMask
from attnzoo.ops.common.negligible import attention_of_peaked, may_be_peaked, product_bound, without_negligible
from attnzoo.ops.common.products import with_keys, with_values
from attnzoo.ops.common.row_blocks import row_block_attention
from attnzoo.types import accumulation_dtype


def sdpa_torch(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: CausalMask, scale: float) -> Tensor:
    grouped = q_BNTH.shape[1] != k_BKSH.shape[1]
    if mask.plain and not peaked_backward(q_BNTH, k_BKSH, v_BKSH, scale=scale):
        return F.scaled_dot_product_attention(q_BNTH, k_BKSH, v_BKSH, is_causal=True, scale=scale, enable_gqa=grouped)
    if mask.parallel:
        return row_block_attention(q_BNTH, k_BKSH, v_BKSH, None, mask, scale)
    if q_BNTH.shape[2] == 1:
        return _one_query(q_BNTH, k_BKSH, v_BKSH, mask, scale)
    visible_BNTS = per_query_head(mask.visible(q_BNTH.shape[2], q_BNTH.device), q_BNTH.shape[1])
    return masked_attention(q_BNTH, k_BKSH, v_BKSH, None, visible_BNTS, scale)


def masked_attention(
    q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, bias_BNTS: Tensor | None, visible_BNTS: Tensor, scale: float
) -> Tensor:
    """Attention under a dense mask, with a term added to the scores: torch's fused form, unless its backward would meet
    denormal numbers."""
    heads, groups = q_BNTH.shape[1], q_BNTH.shape[1] // k_BKSH.shape[1]
    if peaked_backward(q_BNTH, k_BKSH, v_BKSH, bias_BNTS, scale=scale):
        k_BNSH, v_BNSH = (x.repeat_interleave(groups, dim=1) for x in (k_BKSH, v_BKSH))
        return attention_of_peaked(q_BNTH, k_BNSH, v_BNSH, bias_BNTS, ~visible_BNTS, scale)
    mask = visible_BNTS if bias_BNTS is None else bias_BNTS.masked_fill(~visible_BNTS, float("-inf"))
    return F.scaled_dot_product_attention(
        q_BNTH, k_BKSH, v_BKSH, attn_mask=mask, scale=scale, enable_gqa=heads != k_BKSH.shape[1]
    )


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
    return with_values(without_negligible(weights_BKGS), v_BKSH).to(v_BKSH.dtype)


def per_query_head(mask_BKTS: Tensor, heads: int) -> Tensor:
    """A mask per kv head (or one for all) as a mask per query head (or one for all)."""
    kept = mask_BKTS.shape[1]
    return mask_BKTS if kept in (1, heads) else mask_BKTS.repeat_interleave(heads // kept, dim=1)
