"""Few batched products: the queries that share a kv head, and the probe, are rows of one matrix a segment."""

import math

import torch
from torch import Tensor

from attnzoo.ops.paged_decode.entries import Decoded, Entries
from attnzoo.ops.products import with_keys, with_values
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
    scores_BKGTS = scores_BKLS.view(batch, kv_heads, groups, tokens, slots)
    dots, first = None, 0
    for part in parts:
        rows_BKLC = _kept(q_BKLH, part.channels_BKC)
        probed = part is prefix and probe_BKC is not None
        if probed and probe_BKC is not None:
            rows_BKLC = torch.cat([rows_BKLC, probe_BKC[:, :, None]], dim=2)
        product = with_keys(rows_BKLC, part.keys_BKSC)
        if probed:
            dots, product = product[:, :, -1].to(dtype), product[:, :, :-1]
        span_BKGTS = scores_BKGTS[..., first : first + part.slots]
        _add_terms(product.unflatten(2, (groups, tokens)), part, query_positions_BT, span_BKGTS)
        first += part.slots
    if bias_BNTS is not None:
        scores_BKGTS += bias_BNTS.view(scores_BKGTS.shape)
    weights_BKLS = _softmax.out(scores_BKLS, -1, False, out=scores_BKLS)
    out_BKLH: Tensor | None = None
    for part, weights in zip(parts, weights_BKLS.split([part.slots for part in parts], dim=-1), strict=True):
        added = _placed(with_values(weights, part.values_BKSV), part.value_channels_BKV, head_dim)
        out_BKLH = added if out_BKLH is None else out_BKLH + added
    assert out_BKLH is not None
    return Decoded(
        out_BNTH=out_BKLH.reshape(batch, heads, tokens, head_dim).to(q_BNTH.dtype),
        mass_BKS=weights_BKLS.sum(2) if key_mass else None,
        dots_BKP=dots,
    )


def _add_terms(product_BKGTS: Tensor, part: Entries, query_positions_BT: Tensor, out_BKGTS: Tensor) -> None:
    """Scores in the accumulation dtype: the products, the logs of votes, -inf for what a query may not see."""
    bias = None if part.log_votes_BKS is None else part.log_votes_BKS[:, :, None, None]
    if part.positions_BKS is not None:
        positions_BK11S = part.positions_BKS[:, :, None, None]
        hidden = (positions_BK11S < 0) | (positions_BK11S > query_positions_BT[:, None, None, :, None])
        if bias is None:
            bias = torch.zeros((), dtype=out_BKGTS.dtype, device=out_BKGTS.device)
        bias = torch.where(hidden, -math.inf, bias)
    if bias is None:
        out_BKGTS.copy_(product_BKGTS)
    else:
        torch.add(product_BKGTS, bias, out=out_BKGTS)


def _kept(q_BKLH: Tensor, channels_BKC: Tensor | None) -> Tensor:
    if channels_BKC is None:
        return q_BKLH
    return q_BKLH.gather(-1, channels_BKC[:, :, None].expand(-1, -1, q_BKLH.shape[2], -1))


def _placed(out_BKLV: Tensor, channels_BKV: Tensor | None, head_dim: int) -> Tensor:
    if channels_BKV is None:
        return out_BKLV
    out = out_BKLV.new_zeros(*out_BKLV.shape[:3], head_dim)
    return out.scatter(-1, channels_BKV[:, :, None].expand_as(out_BKLV), out_BKLV)
