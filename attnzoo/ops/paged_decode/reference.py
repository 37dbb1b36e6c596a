"""One query at a time over keys in full width: defines the result."""

import math

import torch
from torch import Tensor

from attnzoo.ops.paged_decode.entries import Decoded, Entries
from attnzoo.types import accumulation_dtype


def widened(x_BKSC: Tensor, channels_BKC: Tensor | None, width: int) -> Tensor:
    """Rows of full width, with zeros in the channels that are not stored."""
    if channels_BKC is None:
        return x_BKSC
    out = x_BKSC.new_zeros(*x_BKSC.shape[:3], width)
    return out.scatter(-1, channels_BKC[:, :, None].expand_as(x_BKSC), x_BKSC)


def paged_decode_reference(
    q_BNTH: Tensor,
    prefix: Entries | None,
    tail: Entries,
    query_positions_BT: Tensor,
    bias_BNTS: Tensor | None,
    probe_BKC: Tensor | None,
    accumulated_attention: bool,
) -> Decoded:
    batch, heads, tokens, head_dim = q_BNTH.shape
    parts = [part.placed() for part in (prefix, tail) if part is not None]
    kv_heads = tail.keys_BKSC.shape[1]
    dtype = accumulation_dtype(q_BNTH.dtype)
    keys = torch.cat([widened(part.keys_BKSC, part.channels_BKC, head_dim) for part in parts], dim=2).to(dtype)
    values = torch.cat([widened(part.values_BKSV, part.value_channels_BKV, head_dim) for part in parts], dim=2)
    values = values.to(dtype)
    positions = torch.cat(
        [part.positions_BKS.expand(part.keys_BKSC.shape[:3]) for part in parts if part.positions_BKS is not None], dim=2
    )
    merge_counts = torch.cat([_log_counts(part, dtype) for part in parts], dim=2)
    out = torch.zeros(batch, heads, tokens, head_dim, dtype=dtype, device=q_BNTH.device)
    accumulated = torch.zeros(keys.shape[:3], dtype=dtype, device=q_BNTH.device)
    for b in range(batch):
        for n in range(heads):
            kv = n // (heads // kv_heads)
            for t in range(tokens):
                seen = (positions[b, kv] >= 0) & (positions[b, kv] <= query_positions_BT[b, t])
                logits = keys[b, kv] @ q_BNTH[b, n, t].to(dtype) * head_dim**-0.5 + merge_counts[b, kv]
                if bias_BNTS is not None:
                    logits = logits + bias_BNTS[b, n, t].to(dtype)
                seen = seen & (logits > -math.inf)
                weights = logits[seen].softmax(-1)
                out[b, n, t] = weights @ values[b, kv][seen]
                accumulated[b, kv, seen] += weights
    dots = None
    if probe_BKC is not None and prefix is not None:
        dots = torch.einsum("bkc,bksc->bks", probe_BKC.to(dtype), prefix.keys_BKSC.to(dtype))
    return Decoded(
        out_BNTH=out.to(q_BNTH.dtype), accumulated_BKS=accumulated if accumulated_attention else None, dots_BKP=dots
    )


def _log_counts(part: Entries, dtype: torch.dtype) -> Tensor:
    if part.log_counts_BKS is None:
        return torch.zeros(part.keys_BKSC.shape[:3], dtype=dtype, device=part.keys_BKSC.device)
    return part.log_counts_BKS.to(dtype)
