"""Which channels of keys and values stay: scores per kv head, and the selection of the best.

ThinK (Xu et al., arXiv 2407.21018, eq. 3-6): removing channel d of the keys changes Q K^T by ||Q[:, d] K[:, d]^T||_F^2
= (sum_t q_td^2) (sum_s k_sd^2). With grouped kv heads the first sum runs over the queries of the group, which is exact
for one mask per kv head. Removing a set R changes it by sum_{a,b in R} (Q^T Q)_ab (K^T K)_ab, of which the scores are
the diagonal; `greedy_scores` uses the whole quadratic form.
"""

import torch
from torch import Tensor

from attnzoo.types import accumulation_dtype


def grouped(queries_BNWH: Tensor, kv_heads: int) -> Tensor:
    """The queries that read each kv head: [B, K, G * W, H], in the accumulation dtype."""
    batch, heads, width, head_dim = queries_BNWH.shape
    q = queries_BNWH.to(accumulation_dtype(queries_BNWH.dtype))
    return q.reshape(batch, kv_heads, heads // kv_heads * width, head_dim)


def channel_scores(
    queries_BNWH: Tensor, keys_BKSH: Tensor, held_BKS: Tensor, before_BKH: Tensor | float = 0.0
) -> Tensor:
    """score_BKH of ThinK. held_BKS (bool, K axis 1 or K): entries that hold a key. Missing queries must be zero.
    before_BKH: sums of squares of keys that are not in keys_BKSH."""
    q_BKLH = grouped(queries_BNWH, keys_BKSH.shape[1])
    return q_BKLH.square().sum(2) * (squares(keys_BKSH, held_BKS) + before_BKH)


def condensed(queries_BNWH: Tensor, kv_heads: int) -> Tensor:
    """q_BKWH, the root of the sum of squares over the query heads of a kv head. It has the `channel_scores` of all
    these queries, in the memory of one head."""
    q = queries_BNWH.to(accumulation_dtype(queries_BNWH.dtype)).unflatten(1, (kv_heads, -1))
    return q.square().sum(2).sqrt().to(queries_BNWH.dtype)


def squares(x_BKSH: Tensor, held_BKS: Tensor) -> Tensor:
    """squares_BKH: the sum of x_sd^2 over entries s where held_BKS is True."""
    x = x_BKSH.to(accumulation_dtype(x_BKSH.dtype))
    return x.masked_fill(~held_BKS[..., None], 0.0).square().sum(2)


def stored_squares(x_BKPC: Tensor, channels_BKC: Tensor | None, head_dim: int) -> Tensor:
    """squares_BKH of pruned entries, 0 for a channel that is not stored. Empty slots must be zero."""
    sums_BKC = x_BKPC.to(accumulation_dtype(x_BKPC.dtype)).square().sum(2)
    if channels_BKC is None or channels_BKC.shape[2] == 0:
        return sums_BKC
    return sums_BKC.new_zeros(*sums_BKC.shape[:2], head_dim).scatter(-1, channels_BKC, sums_BKC)


def greedy_scores(queries_BNWH: Tensor, keys_BKSH: Tensor, held_BKS: Tensor) -> Tensor:
    """score_BKH: the step at which greedy removal takes each channel. It takes the channel that adds least to the
    form."""
    q = grouped(queries_BNWH, keys_BKSH.shape[1])
    k = keys_BKSH.to(q.dtype).masked_fill(~held_BKS[..., None], 0.0)
    form_BKHH = (q.mT @ q) * (k.mT @ k)
    cost_BKH = form_BKHH.diagonal(dim1=-2, dim2=-1).clone()
    order_BKH = torch.zeros_like(cost_BKH)
    for step in range(cost_BKH.shape[-1]):
        taken_BK1 = cost_BKH.argmin(-1, keepdim=True)
        order_BKH.scatter_(-1, taken_BK1, float(step))
        row_BKH = form_BKHH.gather(2, taken_BK1[..., None].expand(-1, -1, 1, cost_BKH.shape[-1]))[:, :, 0]
        cost_BKH = (cost_BKH + 2 * row_BKH).scatter_(-1, taken_BK1, torch.inf)
    return order_BKH


def best_channels(scores_BKH: Tensor, count: int) -> Tensor:
    """channels_BKC: the `count` highest, ascending; the lower channel wins ties."""
    order = scores_BKH.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return order.sort(-1).values


def kept_channels(head_dim: int, ratio: float) -> int:
    """Number of channels kept of H: H - floor((1 - ratio) H), at least 1."""
    # Rounded first: 1 - 0.4 is a little less than 0.6, and the floor of 5.999 would prune one channel less.
    return max(1, head_dim - int(round((1.0 - ratio) * head_dim, 9)))


def take_channels(x_BKSH: Tensor, channels_BKC: Tensor) -> Tensor:
    """x_BKSC."""
    return x_BKSH.gather(-1, channels_BKC[:, :, None].expand(-1, -1, x_BKSH.shape[2], -1))


def change_channels(x_BKPC: Tensor, before_BKC: Tensor, after_BKC: Tensor, head_dim: int) -> Tensor:
    """Entries of the channels before_BKC, moved to the channels after_BKC; missing channels become zero."""
    order_C = torch.arange(before_BKC.shape[2], device=x_BKPC.device).expand_as(before_BKC)
    missing = before_BKC.new_full((*before_BKC.shape[:2], head_dim), -1)
    index_BK1C = missing.scatter(-1, before_BKC, order_C).gather(-1, after_BKC)[:, :, None]
    found = x_BKPC.gather(-1, index_BK1C.clamp(min=0).expand(-1, -1, x_BKPC.shape[2], -1))
    return found.masked_fill_(index_BK1C < 0, 0.0)


def hashed(positions: Tensor, seed: int) -> Tensor:
    """Pseudo-random numbers in [0, 1), in float64, that depend only on integers and a seed."""
    x = positions.long() * 0x5851F42D4C957F2D + ((2 * seed + 1) * 0x14057B7EF767814F & (2**63 - 1))
    for _ in range(2):
        x = (x ^ (x >> 29)) * 0x369DEA0F31A53F85
    return ((x ^ (x >> 31)) & 0xFFFFFFFF).double() / 2.0**32


def hashed_heads(kv_heads: int, count: int, seed: int, device: torch.device) -> Tensor:
    """Numbers of `hashed` in the shape [1, K, count], different for every kv head."""
    index = torch.arange(kv_heads * count, device=device).view(1, kv_heads, count)
    return hashed(index, seed)
