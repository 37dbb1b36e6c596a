"""One evicted entry after the other, in plain sums: defines the result."""

import math

import torch
from torch import Tensor

from attnzoo.ops.evict_merge.rule import Arrival, Merged, MergeRule, Slots
from attnzoo.types import accumulation_dtype


def evict_merge_reference(
    keys_BKSC: Tensor,
    values_BKSV: Tensor,
    keep_BKS: Tensor,
    evict_BKS: Tensor,
    slots: int,
    rule: MergeRule,
    threshold_BK: Tensor,
    merge_counts_BKS: Tensor | None,
) -> Merged:
    batch, kv_heads, _, _ = keys_BKSC.shape
    dtype = accumulation_dtype(keys_BKSC.dtype)
    merge_counts = torch.ones(keep_BKS.shape, dtype=dtype) if merge_counts_BKS is None else merge_counts_BKS.to(dtype)
    source = torch.full((batch, kv_heads, slots), -1)
    keys = keys_BKSC.new_zeros(batch, kv_heads, slots, keys_BKSC.shape[3])
    values = values_BKSV.new_zeros(batch, kv_heads, slots, values_BKSV.shape[3])
    new_counts = torch.zeros(batch, kv_heads, slots, dtype=dtype)
    thresholds = threshold_BK.clone()
    for b in range(batch):
        heads = range(kv_heads)
        kept = [keep_BKS[b, k].nonzero()[:, 0].tolist() for k in heads]
        gone = [evict_BKS[b, k].nonzero()[:, 0].tolist() for k in heads]
        matches = [[_match(keys_BKSC[b, k].to(dtype), i, kept[k]) for i in gone[k]] for k in heads]
        near = [[u for u, _ in matches[k]] for k in heads]
        if rule.together:
            near = [[sum(us) / kv_heads for us in zip(*near, strict=True)]] * kv_heads
        for k in heads:
            thresholds[b, k] = _threshold(near[k], float(threshold_BK[b, k]), rule)
            merged: list[list[tuple[int, float]]] = [[] for _ in kept[k]]
            for i, (u, place), seen in zip(gone[k], matches[k], near[k], strict=True):
                if rule.kind != "drop" and place >= 0 and seen >= float(thresholds[b, k]):
                    merged[place].append((i, u))
            for m, j in enumerate(kept[k]):
                source[b, k, m] = j
                p = merge_counts[b, k]
                x = [(float(_weight(u, rule) * p[i]), i, float(p[i])) for i, u in merged[m]]
                own = float(p[j]) * (math.e if rule.kind == "paper" else 1.0)
                total = own + sum(w if rule.kind == "paper" else n for w, _, n in x)
                for old, new in ((keys_BKSC, keys), (values_BKSV, values)):
                    row = old[b, k].to(dtype)
                    new[b, k, m] = (own * row[j] + sum(w * row[i] for w, i, _ in x)) / total
                new_counts[b, k, m] = p[j] + sum(n for _, _, n in x)
    return Merged(
        keys_BKMC=keys,
        values_BKMV=values,
        source_BKM=source,
        merge_counts_BKM=None if merge_counts_BKS is None else new_counts,
        threshold_BK=thresholds,
    )


def _match(keys_SC: Tensor, i: int, kept: list[int]) -> tuple[float, int]:
    """(largest cosine to a kept key, that key's index among the kept ones); (-inf, -1) without any."""
    best, place = -math.inf, -1
    for m, j in enumerate(kept):
        norms = float(keys_SC[i].norm() * keys_SC[j].norm())
        if float(keys_SC[j].norm()) == 0.0:
            continue
        u = float(keys_SC[i] @ keys_SC[j]) / norms if norms else 0.0
        if u > best:
            best, place = u, m
    return best, place


def _threshold(near: list[float], before: float, rule: MergeRule) -> float:
    finite = [u for u in near if u > -math.inf]
    if not finite or rule.kind == "drop":
        return before
    if math.isnan(before):
        return sum(finite) / len(finite)
    new = max(finite) if rule.kind == "paper" else sum(finite) / len(finite)
    return rule.beta * new + (1 - rule.beta) * before


def _weight(u: float, rule: MergeRule) -> float:
    return math.exp(u) if rule.kind == "paper" else u


def evict_merge_step_reference(
    slots: Slots, victim_BK: Tensor, dots_BKP: Tensor, arrival: Arrival, rule: MergeRule, threshold_BK: Tensor
) -> Tensor:
    """The rule of `evict_merge` for one evicted entry, with cosines from dots_BKP; then the arrival."""
    batch, kv_heads = victim_BK.shape
    dtype = dots_BKP.dtype
    out = threshold_BK.clone()
    for b in range(batch):
        cosines = [
            _cosines(slots.norms_BKP[b, k].to(dtype), dots_BKP[b, k], int(victim_BK[b, k])) for k in range(kv_heads)
        ]
        best = [
            max(c.tolist(), default=-math.inf) if v >= 0 else -math.inf
            for c, v in zip(cosines, victim_BK[b], strict=True)
        ]
        near = [sum(best) / kv_heads] * kv_heads if rule.together else best
        for k in range(kv_heads):
            i = int(victim_BK[b, k])
            if i >= 0 and near[k] > -math.inf and rule.kind != "drop":
                before = float(threshold_BK[b, k])
                out[b, k] = _threshold([near[k]], before, rule)
                if near[k] >= float(out[b, k]):
                    _merge_one(slots, (b, k), i, int(cosines[k].argmax()), best[k], rule)
            if i >= 0:
                slots.norms_BKP[b, k, i] = 0.0
            place = i if arrival.slot_BK is None else int(arrival.slot_BK[b, k])
            if place >= 0:
                slots.keys_BKPC[b, k, place] = arrival.key_BKC[b, k]
                slots.values_BKPV[b, k, place] = arrival.value_BKV[b, k]
                slots.norms_BKP[b, k, place] = arrival.key_BKC[b, k].to(dtype).norm()
                if slots.merge_counts_BKP is not None:
                    slots.merge_counts_BKP[b, k, place] = 1.0
    return out


def _cosines(norms_P: Tensor, dots_P: Tensor, victim: int) -> Tensor:
    """Cosines of the victim with all slots; -inf for itself and for empty slots."""
    out = torch.full_like(dots_P, -math.inf)
    for j in range(len(dots_P)):
        if j != victim and norms_P[j] > 0:
            out[j] = dots_P[j] / (norms_P[j] * norms_P[victim]) if norms_P[victim] > 0 else 0.0
    return out


def _merge_one(slots: Slots, place: tuple[int, int], i: int, j: int, u: float, rule: MergeRule) -> None:
    dtype = accumulation_dtype(slots.keys_BKPC.dtype)
    p_i, p_j = (
        (1.0, 1.0) if slots.merge_counts_BKP is None else (float(slots.merge_counts_BKP[place][x]) for x in (i, j))
    )
    own = p_j * (math.e if rule.kind == "paper" else 1.0)
    weight = _weight(u, rule) * p_i
    total = own + (weight if rule.kind == "paper" else p_i)
    for tensor in (slots.keys_BKPC, slots.values_BKPV):
        rows = tensor[place]
        rows[j] = (own * rows[j].to(dtype) + weight * rows[i].to(dtype)) / total
    slots.norms_BKP[(*place, j)] = slots.keys_BKPC[place][j].to(dtype).norm()
    if slots.merge_counts_BKP is not None:
        slots.merge_counts_BKP[(*place, j)] = p_i + p_j
