"""Blocks of queries against all keys that they may see; torch's attention takes the bias as a mask of numbers."""

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnzoo.ops.common.masks import Mask, sees
from attnzoo.ops.common.pair_bias import PairBias
from attnzoo.ops.common.rows import known
from attnzoo.ops.sdpa.torch import opened_attention, per_query_head

BLOCK = 128
"""Queries of a block: fewer make products that are slow, more make memory."""


def pairwise_sdpa_torch(
    q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, bias: PairBias, mask: Mask, scale: float
) -> Tensor:
    tokens, entries = q_BNTH.shape[2], k_BKSH.shape[2]
    if tokens <= BLOCK:
        return _block(q_BNTH, k_BKSH, v_BKSH, bias, mask, scale, slice(0, tokens))
    later = entries if mask.ahead or not mask.parallel else 0
    parts = []
    for first in range(0, tokens, BLOCK):
        rows = slice(first, min(first + BLOCK, tokens))
        used = max(rows.stop, later)
        given = (q_BNTH[:, :, rows], k_BKSH[:, :, :used], v_BKSH[:, :, :used], bias, mask, scale, rows)
        if torch.is_grad_enabled():
            parts.append(checkpoint(_block, *given, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_block(*given))
    return torch.cat(parts, dim=2)


def _block(
    q_BNRH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, bias: PairBias, mask: Mask, scale: float, rows: slice
) -> Tensor:
    """o_BNRH of the queries `rows`; the keys are the first ones."""
    entries, device = k_BKSH.shape[2], q_BNRH.device
    queries_BT, keys_BKS = mask.positions(rows.stop, entries, device)
    starts_BR = None if mask.starts_BT is None else mask.starts_BT[:, rows]
    bias_BNRS = bias.of(queries_BT[:, rows], keys_BKS, mask, q_BNRH.dtype, starts_BR)
    seen_BNRS = per_query_head(_seen(mask, rows, entries, device), bias.heads) & (bias_BNRS != -math.inf)
    # What is hidden may be anything, such as the logarithm of a negative distance.
    bias_BNRS = bias_BNRS.masked_fill(~seen_BNRS, 0.0)
    some_BNR1 = seen_BNRS.any(-1, keepdim=True)
    if known(some_BNR1):
        return opened_attention(q_BNRH, k_BKSH, v_BKSH, bias_BNRS, seen_BNRS, None, scale)
    return opened_attention(q_BNRH, k_BKSH, v_BKSH, bias_BNRS, seen_BNRS | ~some_BNR1, ~some_BNR1, scale)


def _seen(mask: Mask, rows: slice, entries: int, device: torch.device) -> Tensor:
    """`Mask.visible` of a block of queries and the first keys: [B or 1, K, R, S]."""
    queries_BT, keys_BKS = mask.positions(rows.stop, entries, device)
    seen_BKRS = sees(
        queries_BT[:, None, rows, None],
        keys_BKS[:, :, None],
        causal=mask.causal,
        window=mask.window,
        sinks=mask.sinks,
        prefix=None if mask.prefix_B is None else mask.prefix_B[:, None, None, None],
        starts=None if mask.starts_BT is None else mask.starts_BT[:, None, rows, None],
        exists=None if mask.keys_BS is None else mask.keys_BS[:, None, None, :entries],
    )
    if mask.pairs is None:
        return seen_BKRS.expand(-1, -1, rows.stop - rows.start, -1)
    pairs = mask.pairs if mask.pairs.dim() == 4 else mask.pairs[:, None]
    return seen_BKRS & pairs[:, :, rows, :entries]
