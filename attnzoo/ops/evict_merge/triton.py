"""Eviction and merging on a GPU: products of evicted with kept keys in tiles, then one program per kept entry.

Between the two, torch sorts the evicted entries by the kept entry they are merged into, so that the second kernel reads
every row once and writes every kept row once: it merges and compacts in one pass. A decode step is two small launches.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from attnzoo.ops.common.launch import Launch, check_inputs
from attnzoo.ops.evict_merge.launch import merge_launch, nearest_launch, step_launches
from attnzoo.ops.evict_merge.rule import Arrival, Merged, MergeRule, Slots
from attnzoo.ops.evict_merge.torch import compacted, decisive, next_threshold
from attnzoo.ops.relative_sdpa.tilings import ARCHITECTURES

WIDEST_ROW = 256


def evict_merge_triton(
    keys_BKSC: Tensor,
    values_BKSV: Tensor,
    keep_BKS: Tensor,
    evict_BKS: Tensor,
    slots: int,
    rule: MergeRule,
    threshold_BK: Tensor,
    merge_counts_BKS: Tensor | None,
    block: int | None = None,
) -> Merged:
    """As `evict_merge`. `block` replaces the chosen tile size (a power of two, at least 16): tests on tiny shapes use
    it. Raises ValueError for what the kernels cannot do: other dtypes, rows wider than 256, gradients."""
    check_inputs("evict_merge", WIDEST_ROW, keys=keys_BKSC, values=values_BKSV)
    with torch.no_grad():
        source_BKM = compacted(keep_BKS, slots)
        order = offsets = weight_BKS = None
        if rule.kind != "drop" and source_BKM.numel() and keep_BKS.numel():
            near_BKS, place_BKS = _nearest(keys_BKSC, evict_BKS, source_BKM, rule, block)
            decisive_BKS = decisive(near_BKS, evict_BKS) if rule.together else near_BKS
            threshold_BK = next_threshold(decisive_BKS, threshold_BK, rule)
            merge_BKS = (decisive_BKS >= threshold_BK[..., None]) & (near_BKS > -torch.inf)
            weight_BKS = near_BKS.exp() if rule.kind == "paper" else near_BKS
            if merge_counts_BKS is not None:
                weight_BKS = weight_BKS * merge_counts_BKS
            place_BKS = place_BKS.masked_fill(~merge_BKS, slots)
            sorted_BKS, order = place_BKS.sort(dim=-1, stable=True)
            edges = torch.arange(slots + 1, device=order.device, dtype=sorted_BKS.dtype)
            offsets = torch.searchsorted(sorted_BKS, edges.expand(*sorted_BKS.shape[:2], -1).contiguous())
        merged = Merged(
            keys_BKMC=keys_BKSC.new_empty(*source_BKM.shape, keys_BKSC.shape[3]),
            values_BKMV=values_BKSV.new_empty(*source_BKM.shape, values_BKSV.shape[3]),
            source_BKM=source_BKM,
            merge_counts_BKM=None if merge_counts_BKS is None else merge_counts_BKS.new_empty(source_BKM.shape),
            threshold_BK=threshold_BK,
        )
        if source_BKM.numel():
            merging = (order, offsets, None if weight_BKS is None else weight_BKS.float().contiguous())
            merge_launch(keys_BKSC, values_BKSV, merge_counts_BKS, merged, merging, rule)()
    return merged


def _nearest(
    keys_BKSC: Tensor, evict_BKS: Tensor, source_BKM: Tensor, rule: MergeRule, block: int | None
) -> tuple[Tensor, Tensor]:
    near_BKS = torch.empty(keys_BKSC.shape[:3], dtype=torch.float32, device=keys_BKSC.device)
    place_BKS = torch.empty_like(near_BKS, dtype=torch.int32)
    nearest_launch(keys_BKSC, evict_BKS, source_BKM, (near_BKS, place_BKS), rule, block=block)()
    return near_BKS, place_BKS


def evict_merge_step_triton(
    slots: Slots, victim_BK: Tensor, dots_BKP: Tensor, arrival: Arrival, rule: MergeRule, threshold_BK: Tensor
) -> Tensor:
    """As `evict_merge_step`. Raises ValueError for what the kernels cannot do: other dtypes, rows wider than 256,
    gradients, slots whose numbers do not lie side by side (they are written in place)."""
    arrived = {"new key": arrival.key_BKC, "new value": arrival.value_BKV}
    check_inputs("evict_merge_step", WIDEST_ROW, keys=slots.keys_BKPC, values=slots.values_BKPV, **arrived)
    for name, x in (("keys", slots.keys_BKPC), ("values", slots.values_BKPV), ("norms", slots.norms_BKP)):
        if x.numel() and x.stride(-1) != 1:
            raise ValueError(
                f"evict_merge_step with impl='triton' writes {name} in place: their last axis must be dense"
            )
    if victim_BK.numel() == 0 or slots.norms_BKP.numel() == 0:
        return threshold_BK
    with torch.no_grad():
        after_BK = threshold_BK if rule.kind == "drop" else torch.empty_like(threshold_BK).contiguous()
        for launch in step_launches(slots, victim_BK, dots_BKP, arrival, rule, (threshold_BK, after_BK)):
            launch()
    return after_BK


def aot_cases() -> list[Launch]:
    """The bulk form and a step, on meta tensors."""
    cases: list[Launch] = []
    for gpu in ARCHITECTURES:
        for dtype, width in (
            (torch.bfloat16, 64),
            (torch.bfloat16, 128),
            (torch.float32, 38),
            (torch.float32, 256),
        ):
            cases += _case(dtype, width, MergeRule(together=True), gpu)
        cases += _case(torch.bfloat16, 64, MergeRule(kind="drop"), gpu)
    return cases


def _case(dtype: torch.dtype, width: int, rule: MergeRule, gpu: str) -> Iterator[Launch]:
    def meta(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(2, 3, *shape, dtype=kind, device="meta")

    count, kept, floats, index = 1000, 200, torch.float32, torch.int64
    keys, values, merge_counts = meta(count, width), meta(count, width), meta(count, kind=floats)
    merged = Merged(
        keys_BKMC=meta(kept, width),
        values_BKMV=meta(kept, width),
        source_BKM=meta(kept, kind=index),
        merge_counts_BKM=meta(kept, kind=floats),
        threshold_BK=meta(kind=floats),
    )
    merging: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    if rule.kind != "drop":
        found = (meta(count, kind=floats), meta(count, kind=torch.int32))
        yield nearest_launch(keys, meta(count, kind=torch.bool), merged.source_BKM, found, rule, gpu=gpu)
        merging = (meta(count, kind=index), meta(kept + 1, kind=index), meta(count, kind=floats))
    yield merge_launch(keys, values, merge_counts, merged, merging, rule, gpu=gpu)
    yield from step_launches(
        Slots(keys_BKPC=keys, values_BKPV=values, norms_BKP=meta(count), merge_counts_BKP=merge_counts),
        meta(kind=index),
        meta(count, kind=floats),
        Arrival(key_BKC=meta(width), value_BKV=meta(width), slot_BK=meta(kind=index)),
        rule,
        (meta(kind=floats), meta(kind=floats)),
        gpu,
    )
