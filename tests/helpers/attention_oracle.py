"""Softmax attention with a relative table in dense float64: what the Triton kernels must compute.

Written from the formula alone; it shares no code with attnzoo.ops but the mask's definition.
"""

import torch
from torch import Tensor

from attnzoo.ops.common.masks import Mask

NAMES = ("q", "k", "v", "content_bias", "table", "table_bias")


def dense_attention(
    inputs: list[Tensor | None], mask: Mask, scale: float, dtype: torch.dtype = torch.float64, future_rows: int = 0
) -> Tensor:
    """o_BNTH of (q, k, v, content_bias, table, table_bias); a query that sees no key gets zeros."""
    q, k, v, content_bias, table, table_bias = (None if x is None else x.to(dtype) for x in inputs)
    sizes = (q.shape[2], k.shape[2], q.device)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    queries_BT, keys_BKS = mask.positions(*sizes)
    distance = queries_BT[:, None, :, None] - keys_BKS[:, :, None, :]
    seen, distance = (_per_query_head(x, q.shape[1]) for x in (mask.visible(*sizes), distance))
    scores = torch.einsum("bnth,bnsh->bnts", q if content_bias is None else q + content_bias[:, None], k)
    if table is not None:
        logits = torch.einsum("bnth,nph->bntp", q, table) + table_bias[:, None]
        row = (distance + future_rows).clamp(0, table.shape[1] - 1).expand(*scores.shape)
        scores = scores + logits.gather(-1, row)
    empty = ~seen.any(-1, keepdim=True)  # the softmax of a row without keys is NaN
    weights = (scores * scale).masked_fill(~(seen | empty), float("-inf")).softmax(-1).masked_fill(~seen, 0.0)
    held = seen.any(2, keepdim=True).mT.expand(*v.shape[:3], 1)
    return weights @ v.masked_fill(~held, 0.0)


def _per_query_head(x_BKTS: Tensor, heads: int) -> Tensor:
    return x_BKTS if x_BKTS.shape[1] == 1 else x_BKTS.repeat_interleave(heads // x_BKTS.shape[1], 1)


def random_inputs(
    batch: int,
    heads: int,
    kv_heads: int,
    tokens: int,
    head_dim: int,
    rows: int | None,
    *,
    seed: int = 0,
    entries: int | None = None,
) -> list[Tensor | None]:
    """Float32 inputs of the parallel form, as many keys as queries or `entries`; rows None leaves the three parameters
    out."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    keys = tokens if entries is None else entries
    tokenwise = [rand(batch, n, size, head_dim) for n, size in ((heads, tokens), (kv_heads, keys), (kv_heads, keys))]
    if rows is None:
        return [*tokenwise, None, None, None]
    return [*tokenwise, rand(heads, head_dim), rand(heads, rows, head_dim), rand(heads, rows)]


def leaves(inputs: list[Tensor | None], **to: object) -> list[Tensor | None]:
    """Copies that collect gradients."""
    return [None if x is None else x.detach().to(**to).clone().requires_grad_() for x in inputs]
