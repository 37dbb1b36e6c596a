"""One query at a time, in plain sums: what is right."""

from collections.abc import Callable

import torch
from torch import Tensor

from attnzoo.ops.masks import aligned_positions


def sdpa_reference(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    query_positions_BT: Tensor | None,
    key_positions_BKS: Tensor | None,
    scale: float,
) -> Tensor:
    return attend_reference(
        q_BNTH,
        k_BKSH,
        v_BKSH,
        query_positions_BT,
        key_positions_BKS,
        lambda b, n, q, k, i, j: scale * (k @ q),
    )


def attend_reference(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    query_positions_BT: Tensor | None,
    key_positions_BKS: Tensor | None,
    score: Callable[[int, int, Tensor, Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Softmax attention for any score: `score(b, n, q_H, keys_JH, i, j_J)` gives the logits of the visible keys.

    i is the query's logical position, j_J the visible keys' logical positions.
    """
    batch, heads, tokens, _ = q_BNTH.shape
    groups = heads // k_BKSH.shape[1]
    if query_positions_BT is None or key_positions_BKS is None:
        query_positions_BT, key_positions_BKS = aligned_positions(tokens, q_BNTH.device)
    query_positions_BT = query_positions_BT.expand(batch, -1)
    key_positions_BKS = key_positions_BKS.expand(batch, k_BKSH.shape[1], -1)
    rows = []
    for b in range(batch):
        for n in range(heads):
            for t in range(tokens):
                i = query_positions_BT[b, t]
                j = key_positions_BKS[b, n // groups]
                seen = (j >= 0) & (j <= i)
                logits = score(b, n, q_BNTH[b, n, t], k_BKSH[b, n // groups][seen], i, j[seen])
                weights = (logits - logits.max()).exp() if len(logits) else logits
                rows.append((weights / weights.sum()) @ v_BKSH[b, n // groups][seen])
    return torch.stack(rows).view(batch, heads, tokens, v_BKSH.shape[-1])
