"""One query at a time: what is right."""

import math

import torch
from torch import Tensor

from attnzoo.ops.common.masks import Mask
from attnzoo.ops.common.pair_bias import PairBias
from attnzoo.ops.common.tables import Tables
from attnzoo.types import accumulation_dtype


def accumulated_attention_reference(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    mask: Mask,
    counts_B: Tensor | None,
    tables: Tables | PairBias | None,
    log_counts_BKS: Tensor | None,
    scale: float,
) -> Tensor:
    batch, heads, tokens, _ = q_BNTH.shape
    kv_heads = k_BKSH.shape[1]
    dtype = accumulation_dtype(q_BNTH.dtype)
    q, k = q_BNTH.to(dtype), k_BKSH.to(dtype)
    queries_BT, keys_BKS = mask.positions(tokens, k.shape[2], q.device)
    visible = mask.visible(tokens, k.shape[2], q.device).expand(batch, kv_heads, tokens, -1)
    queries_BT, keys_BKS = queries_BT.expand(batch, -1), keys_BKS.expand(batch, kv_heads, -1)
    accumulated = torch.zeros(k.shape[:3], dtype=dtype, device=k.device)
    for b in range(batch):
        for n in range(heads):
            kv = n // (heads // kv_heads)
            for t in range(tokens if counts_B is None else int(counts_B[b])):
                seen = visible[b, kv, t]
                logits = k[b, kv] @ q[b, n, t]
                if isinstance(tables, Tables):
                    rows = (queries_BT[b, t] - keys_BKS[b, kv]).clamp(0, tables.table_bias_NP.shape[1] - 1)
                    logits = logits + k[b, kv] @ tables.content_bias_NH[n].to(dtype)
                    table = tables.table_NPH[n][rows].to(dtype)
                    logits = logits + table @ q[b, n, t, : table.shape[-1]]
                    logits = logits + tables.table_bias_NP[n][rows].to(dtype)
                logits = logits * scale
                if isinstance(tables, PairBias):
                    i, j_S = queries_BT[b, t].clamp(min=0), keys_BKS[b, kv].clamp(min=0)
                    logits = logits + tables.of_query(i, torch.minimum(i, j_S), n).to(dtype)
                    seen = seen & (logits > -math.inf)
                if log_counts_BKS is not None:
                    logits = logits + log_counts_BKS[b, kv]
                accumulated[b, kv, seen] += logits[seen].softmax(-1)
    return accumulated
