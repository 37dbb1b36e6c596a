"""Few batched products: the queries that share a kv head, and the probe, are rows of one matrix a segment."""

import math

import torch
from torch import Tensor

from attnzoo.ops.paged_decode.entries import Decoded, Entries
from attnzoo.types import accumulation_dtype

_softmax = torch.ops.aten._softmax


def paged_decode_torch(
    q_BNTH: Tensor,
    prefix: Entries | None,
    tail: Entries,
    query_positions_BT: Tensor,
    bias_BNTS: Tensor | None,
    probe_BKC: Tensor | None,
    key_mass: bool,
) -> Decoded:
    batch, heads, tokens, head_dim = q_BNTH.shape
    kv_heads = tail.keys_BKSC.shape[1]
    groups = heads // kv_heads
    parts = [tail] if prefix is None else [prefix, tail]
    # Scaling before the products rounds as the full cache's decode step does.
    q_BKLH = (q_BNTH * head_dim**-0.5).reshape(batch, kv_heads, groups * tokens, head_dim)
    slots = sum(part.slots for part in parts)
    dtype = accumulation_dtype(q_BNTH.dtype)
    scores_BKLS = torch.empty(batch, kv_heads, groups * tokens, slots, dtype=dtype, device=q_BNTH.device)
    dots, first = None, 0
    for part in parts:
        rows_BKLC = _kept(q_BKLH, part.channels_BKC)
        probed = part is prefix and probe_BKC is not None
        if probed and probe_BKC is not None:
            rows_BKLC = torch.cat([rows_BKLC, probe_BKC[:, :, None]], dim=2)
        product = rows_BKLC @ part.keys_BKSC.mT
        if probed:
            dots, product = product[:, :, -1].to(dtype), product[:, :, :-1]
        scores_BKLS[..., first : first + part.slots] = product
        first += part.slots
    weights_BKLS = _weights(scores_BKLS, parts, query_positions_BT, bias_BNTS)
    out_BKLH: Tensor | None = None
    for part, weights in zip(parts, weights_BKLS.split([part.slots for part in parts], dim=-1), strict=True):
        added = _placed(weights.to(part.values_BKSV.dtype) @ part.values_BKSV, part.value_channels_BKV, head_dim)
        out_BKLH = added if out_BKLH is None else out_BKLH + added
    assert out_BKLH is not None
    return Decoded(
        out_BNTH=out_BKLH.reshape(batch, heads, tokens, head_dim),
        mass_BKS=weights_BKLS.sum(2) if key_mass else None,
        dots_BKP=dots,
    )


def _weights(scores_BKLS: Tensor, parts: list[Entries], query_positions_BT: Tensor, bias_BNTS: Tensor | None) -> Tensor:
    """The softmax over both segments, in the memory of the scores."""
    batch, kv_heads, _, slots = scores_BKLS.shape
    tokens = query_positions_BT.shape[1]
    scores_BKGTS = scores_BKLS.view(batch, kv_heads, -1, tokens, slots)
    if bias_BNTS is not None:
        scores_BKGTS += bias_BNTS.view(scores_BKGTS.shape)
    first = 0
    for part in parts:
        span = scores_BKGTS[..., first : first + part.slots]
        if part.log_votes_BKS is not None:
            span += part.log_votes_BKS[:, :, None, None]
        positions_BK11S = part.positions_BKS[:, :, None, None]
        hidden = (positions_BK11S < 0) | (positions_BK11S > query_positions_BT[:, None, None, :, None])
        span.masked_fill_(hidden, -math.inf)
        first += part.slots
    out: Tensor = _softmax.out(scores_BKLS, -1, False, out=scores_BKLS)
    return out


def _kept(q_BKLH: Tensor, channels_BKC: Tensor | None) -> Tensor:
    if channels_BKC is None:
        return q_BKLH
    return q_BKLH.gather(-1, channels_BKC[:, :, None].expand(-1, -1, q_BKLH.shape[2], -1))


def _placed(out_BKLV: Tensor, channels_BKV: Tensor | None, head_dim: int) -> Tensor:
    if channels_BKV is None:
        return out_BKLV
    out = out_BKLV.new_zeros(*out_BKLV.shape[:3], head_dim)
    return out.scatter(-1, channels_BKV[:, :, None].expand_as(out_BKLV), out_BKLV)
