"""Finds matches by products with the kept keys, a block of entries at a time; a step moves single rows."""

import math

import torch
from torch import Tensor

from attnzoo.ops.common.rows import Places, places, places_or_none
from attnzoo.ops.evict_merge.rule import Arrival, Merged, MergeRule, Slots
from attnzoo.types import accumulation_dtype

BLOCK_BYTES = 16 << 20
"""Bytes of the cosines of a block of entries with all kept ones."""


def evict_merge_torch(
    keys_BKSC: Tensor,
    values_BKSV: Tensor,
    keep_BKS: Tensor,
    evict_BKS: Tensor,
    slots: int,
    rule: MergeRule,
    threshold_BK: Tensor,
    merge_counts_BKS: Tensor | None,
) -> Merged:
    source_BKM = compacted(keep_BKS, slots)
    index_BKM, empty_BKM = source_BKM.clamp(min=0), source_BKM < 0
    keys, values = (_rows(x, index_BKM).masked_fill_(empty_BKM[..., None], 0.0) for x in (keys_BKSC, values_BKSV))
    merge_counts = (
        None if merge_counts_BKS is None else merge_counts_BKS.gather(-1, index_BKM).masked_fill_(empty_BKM, 0.0)
    )
    if rule.kind == "drop" or not bool(evict_BKS.any()):
        return Merged(
            keys_BKMC=keys,
            values_BKMV=values,
            source_BKM=source_BKM,
            merge_counts_BKM=merge_counts,
            threshold_BK=threshold_BK,
        )
    near_BKS, place_BKS = _nearest(keys_BKSC, keys)
    near_BKS = near_BKS.masked_fill_(~evict_BKS, -math.inf)
    decisive_BKS = decisive(near_BKS, evict_BKS) if rule.together else near_BKS
    threshold_BK = next_threshold(decisive_BKS, threshold_BK, rule)
    merge_BKS = (decisive_BKS >= threshold_BK[..., None]) & (near_BKS > -math.inf)
    weight_BKS = near_BKS.exp() if rule.kind == "paper" else near_BKS
    counted_BKS = (
        merge_BKS.to(weight_BKS.dtype)
        if merge_counts_BKS is None
        else merge_counts_BKS.to(weight_BKS.dtype) * merge_BKS
    )
    weight_BKS = weight_BKS.masked_fill(~merge_BKS, 0.0) * counted_BKS
    place_BKS = place_BKS.masked_fill_(~merge_BKS, slots)
    own_BKM = (
        torch.ones_like(empty_BKM, dtype=weight_BKS.dtype)
        if merge_counts is None
        else merge_counts.to(weight_BKS.dtype)
    )
    added_BKM = _sums(counted_BKS[..., None], None, place_BKS, slots)[..., 0]
    scale = math.e if rule.kind == "paper" else 1.0
    total = own_BKM * scale
    total += _sums(weight_BKS[..., None], None, place_BKS, slots)[..., 0] if rule.kind == "paper" else added_BKM
    total.masked_fill_(empty_BKM, 1.0)
    keys, values = (
        ((own_BKM * scale)[..., None] * kept + _sums(x, weight_BKS, place_BKS, slots))
        .div_(total[..., None])
        .to(x.dtype)
        for kept, x in ((keys, keys_BKSC), (values, values_BKSV))
    )
    return Merged(
        keys_BKMC=keys,
        values_BKMV=values,
        source_BKM=source_BKM,
        merge_counts_BKM=None if merge_counts is None else merge_counts + added_BKM.to(merge_counts.dtype),
        threshold_BK=threshold_BK,
    )


def compacted(keep_BKS: Tensor, slots: int) -> Tensor:
    """source_BKM (int64): the indices of the kept entries in order, then -1."""
    place_BKS = torch.where(keep_BKS, keep_BKS.cumsum(-1) - 1, slots)
    source = torch.full((*keep_BKS.shape[:2], slots + 1), -1, dtype=torch.int64, device=keep_BKS.device)
    order = torch.arange(keep_BKS.shape[2], device=keep_BKS.device).expand_as(keep_BKS)
    return source.scatter_(-1, place_BKS, order)[..., :slots]


def decisive(near_BKS: Tensor, evict_BKS: Tensor) -> Tensor:
    """For the n-th evicted entry of every kv head, the mean of near_BKS over all heads; -inf for kept entries."""
    order_BKE = compacted(evict_BKS, int(evict_BKS.sum(-1).max()))
    near_BKE = near_BKS.gather(-1, order_BKE.clamp(min=0)).masked_fill_(order_BKE < 0, -math.inf)
    mean_BKE = near_BKE.mean(1, keepdim=True).expand_as(near_BKE)
    count = near_BKS.shape[2]
    out_BKS = near_BKS.new_full((*near_BKS.shape[:2], count + 1), -math.inf)
    return out_BKS.scatter_(-1, order_BKE.masked_fill(order_BKE < 0, count), mean_BKE)[..., :count]


def _rows(x_BKSC: Tensor, index_BKM: Tensor) -> Tensor:
    return x_BKSC.gather(2, index_BKM[..., None].expand(-1, -1, -1, x_BKSC.shape[3]))


def _unit(x: Tensor) -> Tensor:
    """Rows of Euclidean norm 1; zero rows stay zero."""
    return x / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


def _nearest(keys_BKSC: Tensor, kept_BKMC: Tensor) -> tuple[Tensor, Tensor]:
    """(largest cosine with a nonzero kept key, that key's index), both [B, K, S]."""
    batch, kv_heads, count, _ = keys_BKSC.shape
    dtype = accumulation_dtype(keys_BKSC.dtype)
    kept = kept_BKMC.to(dtype)
    zero_BK1M = (kept == 0).all(-1)[:, :, None]
    unit_BKCM = _unit(kept).mT.contiguous()
    near = torch.empty(keys_BKSC.shape[:3], dtype=dtype, device=keys_BKSC.device)
    place = torch.empty(keys_BKSC.shape[:3], dtype=torch.int64, device=keys_BKSC.device)
    block = max(1, BLOCK_BYTES // (batch * kv_heads * max(kept.shape[2], 1) * dtype.itemsize))
    for first in range(0, count, block):
        part = slice(first, first + block)
        cosines = (_unit(keys_BKSC[:, :, part].to(dtype)) @ unit_BKCM).masked_fill_(zero_BK1M, -math.inf)
        near[:, :, part], place[:, :, part] = cosines.max(-1)
    return near, place


def next_threshold(near_BKS: Tensor, before_BK: Tensor, rule: MergeRule) -> Tensor:
    """The next threshold_BK, from the entries whose near_BKS is finite; where there are none it stays."""
    finite = near_BKS > -math.inf
    count = finite.sum(-1)
    mean = near_BKS.masked_fill(~finite, 0.0).sum(-1) / count.clamp(min=1)
    new = near_BKS.amax(-1) if rule.kind == "paper" else mean
    later = rule.beta * new + (1 - rule.beta) * before_BK
    return torch.where(count == 0, before_BK, torch.where(before_BK.isnan(), mean, later).to(before_BK.dtype))


def _sums(x_BKSC: Tensor, weight_BKS: Tensor | None, place_BKS: Tensor, slots: int) -> Tensor:
    """Weighted rows of x, summed by the slot place_BKS that they are merged into; `slots` stands for none."""
    batch, kv_heads, _, width = x_BKSC.shape
    heads = torch.arange(batch * kv_heads, device=x_BKSC.device).view(batch, kv_heads, 1)
    index_L = (place_BKS + heads * (slots + 1)).flatten()
    rows = x_BKSC if weight_BKS is None else x_BKSC.to(weight_BKS.dtype) * weight_BKS[..., None]
    out = rows.new_zeros(batch * kv_heads * (slots + 1), width)
    out.scatter_add_(0, index_L[:, None].expand(-1, width), rows.reshape(-1, width))
    return out.view(batch, kv_heads, slots + 1, width)[:, :, :slots]


def evict_merge_step_torch(
    slots: Slots, victim_BK: Tensor, dots_BKP: Tensor, arrival: Arrival, rule: MergeRule, threshold_BK: Tensor
) -> Tensor:
    norms, count = slots.norms_BKP, slots.norms_BKP.shape[2]
    victims = places_or_none(victim_BK, count)
    arrivals = victims if arrival.slot_BK is None else places_or_none(arrival.slot_BK, count)
    if rule.kind != "drop":
        threshold_BK = _merge_victims(slots, victims, dots_BKP, rule, threshold_BK)
    victims.fill(norms, 0.0)
    arrivals.put(slots.keys_BKPC, arrival.key_BKC)
    arrivals.put(slots.values_BKPV, arrival.value_BKV)
    arrivals.put(norms, arrival.key_BKC.to(dots_BKP.dtype).norm(dim=-1))
    if slots.merge_counts_BKP is not None:
        arrivals.fill(slots.merge_counts_BKP, 1.0)
    return threshold_BK


def _merge_victims(slots: Slots, victims: Places, dots_BKP: Tensor, rule: MergeRule, threshold_BK: Tensor) -> Tensor:
    dtype, norms = dots_BKP.dtype, slots.norms_BKP
    near_BK, nearest = _nearest_slots(norms, victims, dots_BKP)
    decisive_BK = near_BK.mean(1, keepdim=True).expand_as(near_BK) if rule.together else near_BK
    # `next_threshold` of one entry, which is its own mean and maximum.
    later_BK = rule.beta * decisive_BK + (1 - rule.beta) * threshold_BK
    new_BK = torch.where(threshold_BK.isnan(), decisive_BK, later_BK).to(threshold_BK.dtype)
    threshold_BK = torch.where(decisive_BK > -math.inf, new_BK, threshold_BK)
    merge_BK = (decisive_BK >= threshold_BK) & (near_BK > -math.inf)
    own: Tensor | float = math.e if rule.kind == "paper" else 1.0
    weight_BK = near_BK.exp() if rule.kind == "paper" else near_BK
    count: Tensor | float = 1.0
    if slots.merge_counts_BKP is not None:
        mine, theirs = (where.take(slots.merge_counts_BKP).to(dtype) for where in (nearest, victims))
        own, weight_BK, count = own * mine, weight_BK * theirs, theirs
        nearest.put(slots.merge_counts_BKP, torch.where(merge_BK, mine + theirs, mine))
    total = own + (weight_BK if rule.kind == "paper" else count)
    own_BK = torch.where(merge_BK, own / total, 1.0)
    weight_BK = torch.where(merge_BK, weight_BK / total, 0.0)
    for tensor, keys in ((slots.keys_BKPC, True), (slots.values_BKPV, False)):
        kept, gone = (where.take(tensor).to(dtype) for where in (nearest, victims))
        mixed = (own_BK[..., None] * kept).addcmul_(weight_BK[..., None], gone).to(tensor.dtype)
        nearest.put(tensor, mixed)
        if keys:
            length_BK = mixed.to(dtype).norm(dim=-1).to(norms.dtype)
            nearest.put(norms, torch.where(merge_BK, length_BK, nearest.take(norms)))
    return threshold_BK


def _nearest_slots(norms_BKP: Tensor, victims: Places, dots_BKP: Tensor) -> tuple[Tensor, Places]:
    """(largest cosine of the victim with another key, -inf where there is none; its slot)."""
    # Nothing may be matched with the victim, not even itself.
    cosines = torch.where(norms_BKP > 0, dots_BKP / norms_BKP, -math.inf)
    victims.fill(cosines, -math.inf)
    # argmax, because `max` with indices starts threads even for small tensors.
    nearest = places(cosines.argmax(-1), norms_BKP.shape[2])
    near_BK = nearest.take(cosines)
    norm_BK = victims.take(norms_BKP).to(near_BK.dtype)
    near_BK = torch.where(norm_BK > 0, near_BK / norm_BK, near_BK.clamp(max=0.0))
    if victims.meant_BK is not None:
        near_BK = near_BK.masked_fill_(~victims.meant_BK, -math.inf)
    return near_BK, nearest
