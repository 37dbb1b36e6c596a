"""One query at a time, in plain sums: what is right."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from attnzoo.ops.common.masks import Mask

Score = Callable[[int, int, Tensor, Tensor, Tensor, Tensor], Tensor]


def sdpa_reference(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: Mask, scale: float) -> Tensor:
    return attend_reference(q_BNTH, k_BKSH, v_BKSH, mask, lambda b, n, q, k, i, j: scale * (k @ q))


def attend_reference(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: Mask, score: Score) -> Tensor:
    """Softmax attention for any score: `score(b, n, q_H, keys_JH, i, j_J)` gives the logits of the visible keys.

    i is the query's logical position, j_J the visible keys' logical positions. A score of -inf hides its key. A query
    that sees none gets zeros.
    """
    batch, heads, tokens, _ = q_BNTH.shape
    kv_heads = k_BKSH.shape[1]
    queries_BT, keys_BKS = mask.positions(tokens, k_BKSH.shape[2], q_BNTH.device)
    queries_BT, keys_BKS = queries_BT.expand(batch, -1), keys_BKS.expand(batch, kv_heads, -1)
    rows = []
    for b in range(batch):
        for n in range(heads):
            kv = n // (heads // kv_heads)
            for t in range(tokens):
                i, j = queries_BT[b, t], keys_BKS[b, kv]
                seen = _seen_by(mask, b, n, t, i, j)
                logits = score(b, n, q_BNTH[b, n, t], k_BKSH[b, kv][seen], i, j[seen])
                shown = logits > -math.inf
                logits = logits[shown]
                weights = (logits - logits.max()).exp() if len(logits) else logits
                rows.append((weights / weights.sum()) @ v_BKSH[b, kv][seen][shown])
    return torch.stack(rows).view(batch, heads, tokens, v_BKSH.shape[-1])


def _seen_by(mask: Mask, b: int, n: int, t: int, i: Tensor, j_J: Tensor) -> Tensor:
    """Which keys the query t of a row and head sees. Written apart from `Mask.visible`, which it checks."""
    seen = j_J >= 0
    if mask.keys_BS is not None:
        seen = seen & mask.keys_BS[b]
    if mask.pairs is not None:
        seen = seen & (mask.pairs[b, t] if mask.pairs.dim() == 3 else mask.pairs[b, n, t])
    if not mask.causal:
        return seen
    start = 0 if mask.starts_BT is None else mask.starts_BT[b, t]
    past = (start <= j_J) & (j_J <= i)
    if mask.window is not None:
        past = past & ((i - j_J < mask.window) | (j_J - start < mask.sinks))
    if mask.prefix_B is not None and i < mask.prefix_B[b]:
        past = past | (j_J < mask.prefix_B[b])
    return seen & past
