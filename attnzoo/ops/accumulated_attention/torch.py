"""Blocks of query rows against the keys that they may see; only the block's scores exist at once."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnzoo.ops.common.masks import Mask
from attnzoo.ops.common.negligible import softmax_of_peaked_
from attnzoo.ops.common.pair_bias import PairBias
from attnzoo.ops.common.tables import Tables
from attnzoo.ops.relative_sdpa.torch import streamed_bias
from attnzoo.types import accumulation_dtype

ROWS = 128
"""Query rows of a block: fewer make products that are slow."""
BLOCK_BYTES = 16 << 20
"""Scores of a block: as many sequences as fit, at least one."""


def accumulated_attention_torch(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    mask: Mask,
    counts_B: Tensor | None,
    tables: Tables | PairBias | None,
    log_counts_BKS: Tensor | None,
    scale: float,
) -> Tensor:
    batch, heads, tokens, _ = q_BNTH.shape
    slots, dtype = k_BKSH.shape[2], accumulation_dtype(q_BNTH.dtype)
    queries_BT, keys_BKS = (x.expand(batch, *x.shape[1:]) for x in mask.positions(tokens, slots, q_BNTH.device))
    accumulated_BKS = torch.zeros(k_BKSH.shape[:3], dtype=dtype, device=k_BKSH.device)
    together = max(1, BLOCK_BYTES // (heads * min(ROWS, tokens) * max(slots, 1) * dtype.itemsize))
    for b in range(0, batch, together):
        rows = slice(b, b + together)
        part = _Part(
            q_BNTH[rows],
            k_BKSH[rows],
            replace(mask, query_positions_BT=queries_BT[rows], key_positions_BKS=keys_BKS[rows]),
            None if counts_B is None else counts_B[rows],
            tables,
            None if log_counts_BKS is None else log_counts_BKS[rows],
            scale,
        )
        for first in range(0, tokens, ROWS):
            part.add_to(accumulated_BKS[rows], slice(first, min(first + ROWS, tokens)))
    return accumulated_BKS


@dataclass(frozen=True)
class _Part:
    """Sequences whose blocks are computed together."""

    q_BNTH: Tensor
    k_BKSH: Tensor
    mask: Mask
    counts_B: Tensor | None
    tables: Tables | PairBias | None
    log_counts_BKS: Tensor | None
    scale: float

    def add_to(self, accumulated_BKS: Tensor, block: slice) -> None:
        """The block's columns, summed."""
        queries_BT, keys_BKS = self.mask.positions(self.q_BNTH.shape[2], self.k_BKSH.shape[2], self.q_BNTH.device)
        at_BR = queries_BT[:, block]
        used = _reach(keys_BKS, at_BR)
        mask = replace(self.mask, query_positions_BT=at_BR, key_positions_BKS=keys_BKS[:, :, :used])
        q, bias, merge_counts = self.q_BNTH[:, :, block], None, None
        content = q * self.scale
        places = (at_BR, keys_BKS[:, :, :used])
        pairs = isinstance(self.tables, PairBias)
        if isinstance(self.tables, PairBias):
            bias = self.tables.of(*places, mask, q.dtype)
        elif self.tables is not None:
            content = (q + self.tables.content_bias_NH[:, None]).to(q.dtype) * self.scale
            bias = streamed_bias(q, self.tables, places, self.scale)
        if self.log_counts_BKS is not None:
            merge_counts = self.log_counts_BKS[:, :, :used]
        weights_BKGRS = _weights(content, self.k_BKSH[:, :, :used], mask, bias, merge_counts, pairs)
        if self.counts_B is not None:
            steps = torch.arange(block.start, block.stop, device=accumulated_BKS.device)
            weights_BKGRS *= (steps < self.counts_B[:, None])[:, None, None, :, None]
        accumulated_BKS[:, :, :used] += weights_BKGRS.sum((2, 3))


def _reach(keys_BKS: Tensor, queries_BR: Tensor) -> int:
    """Slots up to the last one that some query of the block may see."""
    seen_S = ((keys_BKS >= 0) & (keys_BKS <= queries_BR.amax(1)[:, None, None])).any(0).any(0)
    return int((seen_S * torch.arange(1, len(seen_S) + 1, device=seen_S.device)).max())


def _weights(
    q_BNRH: Tensor,
    k_BKSH: Tensor,
    mask: Mask,
    bias_BNRS: Tensor | None,
    log_counts_BKS: Tensor | None,
    hides: bool,
) -> Tensor:
    """Softmax of the block: [B, K, G, R, S]; zeros for a query that sees nothing. hides: a bias of -inf may hide."""
    batch, heads, rows, _ = q_BNRH.shape
    kv_heads, slots = k_BKSH.shape[1:3]
    dtype = accumulation_dtype(q_BNRH.dtype)
    product = q_BNRH.reshape(batch, kv_heads, -1, q_BNRH.shape[3]) @ k_BKSH.mT
    scores_BKGRS = product.to(dtype).view(batch, kv_heads, heads // kv_heads, rows, slots)
    hidden_BKGRS = ~mask.visible(rows, slots, q_BNRH.device)[:, :, None]
    if bias_BNRS is not None:
        bias_BKGRS = bias_BNRS.reshape(scores_BKGRS.shape)
        scores_BKGRS = scores_BKGRS + bias_BKGRS
        hidden_BKGRS = hidden_BKGRS | (bias_BKGRS == -math.inf) if hides else hidden_BKGRS
    if log_counts_BKS is not None:
        scores_BKGRS = scores_BKGRS + log_counts_BKS[:, :, None, None]
    # Not -inf: padding queries may see nothing at all, and their NaN would survive a product with zero.
    scores_BKGRS = scores_BKGRS.masked_fill_(hidden_BKGRS, torch.finfo(dtype).min)
    return softmax_of_peaked_(scores_BKGRS).masked_fill_(hidden_BKGRS, 0.0)
