"""Evicts tokens from a cache, and merges those that are similar to a kept token into it (D2O, arXiv 2406.13035).

`evict_merge`: many entries at once; the kept ones are compacted. `evict_merge_step`: one entry per kv head during
decode, whose slot another takes, in place and without moving the rest. `MergeRule` says what is merged and how.
"""

from torch import Tensor

from attnzoo.ops.common.impl import Impl, choose, lazily
from attnzoo.ops.evict_merge.reference import evict_merge_reference, evict_merge_step_reference
from attnzoo.ops.evict_merge.rule import Arrival, Merged, MergeRule, Slots
from attnzoo.ops.evict_merge.torch import evict_merge_step_torch, evict_merge_torch

IMPLEMENTATIONS = {
    "reference": evict_merge_reference,
    "torch": evict_merge_torch,
    "triton": lazily("attnzoo.ops.evict_merge.triton", "evict_merge_triton"),
}
STEPS = {
    "reference": evict_merge_step_reference,
    "torch": evict_merge_step_torch,
    "triton": lazily("attnzoo.ops.evict_merge.triton", "evict_merge_step_triton"),
}


def evict_merge(
    keys_BKSC: Tensor,
    values_BKSV: Tensor,
    *,
    keep_BKS: Tensor,
    evict_BKS: Tensor,
    slots: int,
    rule: MergeRule,
    threshold_BK: Tensor,
    merge_counts_BKS: Tensor | None = None,
    impl: Impl = "auto",
) -> Merged:
    """Keeps the entries of `keep_BKS` (bool) in `slots` slots, in order, after merging those of `evict_BKS` into them.

    Entries in neither are empty. threshold_BK (accumulation dtype): the previous threshold, NaN for none yet. Sums are
    in the accumulation dtype. Inputs are not changed. Raises ValueError when shapes do not fit, a kv head keeps more
    than `slots`, or kv heads that decide together evict different numbers of entries.
    """
    shape = keys_BKSC.shape[:3]
    for name, tensor in (("values", values_BKSV[..., 0]), ("keep", keep_BKS), ("evict", evict_BKS)):
        if tensor.shape != shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} does not fit keys {tuple(keys_BKSC.shape)}")
    if threshold_BK.shape != shape[:2]:
        raise ValueError(f"threshold_BK {tuple(threshold_BK.shape)} must be {tuple(shape[:2])}")
    most = int(keep_BKS.sum(-1).max()) if keep_BKS.numel() else 0
    if most > slots:
        raise ValueError(f"slots={slots} cannot hold the {most} entries that one kv head keeps")
    if rule.together and bool((evict_BKS.sum(-1) != evict_BKS[:, :1].sum(-1)).any()):
        raise ValueError("kv heads that decide together must evict as many entries each")
    run = choose("evict_merge", impl, IMPLEMENTATIONS, keys_BKSC)
    out: Merged = run(keys_BKSC, values_BKSV, keep_BKS, evict_BKS, slots, rule, threshold_BK, merge_counts_BKS)
    return out


def evict_merge_step(
    slots: Slots,
    *,
    victim_BK: Tensor,
    dots_BKP: Tensor,
    arrival: Arrival,
    rule: MergeRule,
    threshold_BK: Tensor,
    impl: Impl = "auto",
) -> Tensor:
    """Merges the victims into entries that stay and writes the arrivals, both in place; returns the next threshold_BK.

    victim_BK (int64): the slot that is evicted, -1 for none; without a victim the threshold stays. dots_BKP
    (accumulation dtype): victim's key . key of every slot. An arrival may take the victim's slot, with its norm and a
    count of one. Without another entry, a victim is dropped. No gradients. Raises ValueError when shapes do not fit.
    """
    shape = slots.keys_BKPC.shape[:3]
    for name, tensor in (("norms", slots.norms_BKP), ("dots", dots_BKP), ("values", slots.values_BKPV[..., 0])):
        if tensor.shape != shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} does not fit keys {tuple(slots.keys_BKPC.shape)}")
    for name, given in (("victim", victim_BK), ("slot", arrival.slot_BK), ("threshold", threshold_BK)):
        if given is not None and given.shape != shape[:2]:
            raise ValueError(f"{name}_BK {tuple(given.shape)} must be {tuple(shape[:2])}")
    run = choose("evict_merge_step", impl, STEPS, slots.keys_BKPC)
    out: Tensor = run(slots, victim_BK, dots_BKP, arrival, rule, threshold_BK)
    return out


__all__ = ["Arrival", "MergeRule", "Merged", "Slots", "evict_merge", "evict_merge_step"]
