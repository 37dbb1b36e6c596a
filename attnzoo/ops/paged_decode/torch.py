"""Few batched products: the queries that share a kv head, and the probe, are rows of one matrix a segment."""

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from attnzoo.ops.common.negligible import without_negligible
from attnzoo.ops.common.products import with_keys, with_values
from attnzoo.ops.paged_decode.entries import Decoded, Entries
from attnzoo.types import accumulation_dtype


def paged_decode_torch(
    q_BNTH: Tensor,
    prefix: Entries | None,
    tail: Entries,
    query_positions_BT: Tensor,
    bias_BNTS: Tensor | None,
    probe_BKC: Tensor | None,
    accumulated_attention: bool,
) -> Decoded:
    batch, heads, tokens, head_dim = q_BNTH.shape
    kv_heads = tail.keys_BKSC.shape[1]
    groups = heads // kv_heads
    parts = [tail] if prefix is None else [prefix, tail]
    # Scaling before the products rounds as the full cache's decode step does.
    q_BKLH = (q_BNTH * head_dim**-0.5).reshape(batch, kv_heads, groups * tokens, head_dim)
    dtype = accumulation_dtype(q_BNTH.dtype)
    biases: Sequence[Tensor | None] = [None] * len(parts)
    if bias_BNTS is not None:
        biases = bias_BNTS.view(batch, kv_heads, groups, tokens, -1).split([part.slots for part in parts], dim=-1)
    dots, scores = None, []
    for part, bias in zip(parts, biases, strict=True):
        rows_BKLC = _kept(q_BKLH, part.channels_BKC)
        probed = part is prefix and probe_BKC is not None
        if probed and probe_BKC is not None:
            rows_BKLC = torch.cat([rows_BKLC, probe_BKC[:, :, None]], dim=2)
        product = with_keys(rows_BKLC, part.keys_BKSC)
        if probed:
            dots, product = product[:, :, -1].to(dtype), product[:, :, :-1]
        scores_BKGTS = product.to(dtype, memory_format=torch.contiguous_format).unflatten(2, (groups, tokens))
        for term in (bias, _terms(part, query_positions_BT, dtype)):
            if term is not None:
                scores_BKGTS = scores_BKGTS + term
        scores.append(scores_BKGTS.flatten(2, 3))
    weights, scale_BKL1 = _softmax(scores)
    out_BKLH: Tensor | None = None
    for part, weights_BKLS in zip(parts, weights, strict=True):
        added = _placed(with_values(weights_BKLS, part.values_BKSV), part.value_channels_BKV, head_dim)
        out_BKLH = added if out_BKLH is None else out_BKLH + added
    assert out_BKLH is not None
    accumulated_BKS = None
    if accumulated_attention:
        accumulated_BKS = torch.cat([(weights_BKLS * scale_BKL1).sum(2) for weights_BKLS in weights], dim=-1)
    return Decoded(
        out_BNTH=(out_BKLH * scale_BKL1).reshape(batch, heads, tokens, head_dim).to(q_BNTH.dtype),
        accumulated_BKS=accumulated_BKS,
        dots_BKP=dots,
    )


def _terms(part: Entries, query_positions_BT: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The terms added to scores_BKGTS: logs of merge counts, and -inf for entries that a query may not see."""
    added = None if part.log_counts_BKS is None else part.log_counts_BKS[:, :, None, None]
    if part.positions_BKS is None:
        return added
    positions_BK11S = part.positions_BKS[:, :, None, None]
    hidden = (positions_BK11S < 0) | (positions_BK11S > query_positions_BT[:, None, None, :, None])
    if added is None:
        added = torch.zeros((), dtype=dtype, device=hidden.device)
    return torch.where(hidden, -math.inf, added)


def _softmax(scores: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor]:
    """One softmax over the last axis of all parts together, as (weights, scale): the softmax is weights * scale.

    The parts are not concatenated, which would copy them into rows without alignment.
    """
    peak = reduce(torch.maximum, [part.amax(-1, keepdim=True) for part in scores if part.shape[-1]])
    peak = peak.clamp_(min=torch.finfo(peak.dtype).min)  # a row of nothing: no difference of infinities
    weights = [without_negligible((part - peak).exp_()) for part in scores]
    total = reduce(torch.add, [part.sum(-1, keepdim=True) for part in weights])
    return weights, total.clamp_(min=1.0).reciprocal()  # it is at least 1, the weight at the peak, or 0 of nothing


def _kept(q_BKLH: Tensor, channels_BKC: Tensor | None) -> Tensor:
    if channels_BKC is None:
        return q_BKLH
    return q_BKLH.gather(-1, channels_BKC[:, :, None].expand(-1, -1, q_BKLH.shape[2], -1))


def _placed(out_BKLV: Tensor, channels_BKV: Tensor | None, head_dim: int) -> Tensor:
    if channels_BKV is None:
        return out_BKLV
    out = out_BKLV.new_zeros(*out_BKLV.shape[:3], head_dim)
    return out.scatter(-1, channels_BKV[:, :, None].expand_as(out_BKLV), out_BKLV)
