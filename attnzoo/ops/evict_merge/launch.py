"""The launches of evict_merge and evict_merge_step: grids and arguments."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from attnzoo.ops.common.launch import TYPES, Launch
from attnzoo.ops.common.strided import strided_rows
from attnzoo.ops.evict_merge.kernels import (
    MergeTile,
    Numbers,
    match_kernel,
    merge_kernel,
    nearest_kernel,
    replace_kernel,
)
from attnzoo.ops.evict_merge.rule import Arrival, Merged, MergeRule, Slots
from attnzoo.ops.relative_sdpa.tilings import architecture

CHUNK = 8
"""Entries that a program merges at once; most kept entries get few."""
MATCHED = 1024
"""Slots that a program compares with the victim at once."""


def nearest_launch(
    keys_BKSC: Tensor,
    evict_BKS: Tensor,
    source_BKM: Tensor,
    found: tuple[Tensor, Tensor],
    rule: MergeRule,
    *,
    block: int | None = None,
    gpu: str | None = None,
) -> Launch:
    """Fills `found`: near_BKS (float32) and place_BKS (int32)."""
    batch, kv_heads, count, _ = keys_BKSC.shape
    tile = _tile(keys_BKSC, keys_BKSC, rule, block)
    return _launch(
        nearest_kernel,
        (int(triton.cdiv(count, tile.block)), kv_heads, batch),
        tile,
        gpu,
        4,
        keys=strided_rows(keys_BKSC),
        evict=evict_BKS.contiguous(),
        source=source_BKM.contiguous(),
        near=found[0],
        places=found[1],
        slots=count,
        kept=source_BKM.shape[2],
    )


def merge_launch(
    keys_BKSC: Tensor,
    values_BKSV: Tensor,
    merge_counts_BKS: Tensor | None,
    merged: Merged,
    merging: tuple[Tensor | None, Tensor | None, Tensor | None],
    rule: MergeRule,
    *,
    gpu: str | None = None,
) -> Launch:
    """Fills keys, values and merge counts of `merged`; merging: (order, offsets, weights), None where nothing
    merges."""
    batch, kv_heads, count, _ = keys_BKSC.shape
    slots = merged.source_BKM.shape[2]
    return _launch(
        merge_kernel,
        (slots, kv_heads, batch),
        _tile(keys_BKSC, values_BKSV, rule, None),
        gpu,
        1,
        keys=strided_rows(keys_BKSC),
        values=strided_rows(values_BKSV),
        merge_counts=_numbers(merge_counts_BKS),
        source=merged.source_BKM.contiguous(),
        order=merging[0],
        offsets=merging[1],
        weights=merging[2],
        new_keys=merged.keys_BKMC,
        new_values=merged.values_BKMV,
        new_counts=merged.merge_counts_BKM,
        slots=count,
        kept=slots,
        CHUNK=CHUNK,
    )


def step_launches(
    slots: Slots,
    victim_BK: Tensor,
    dots_BKP: Tensor,
    arrival: Arrival,
    rule: MergeRule,
    thresholds: tuple[Tensor, Tensor],
    gpu: str | None = None,
) -> Iterator[Launch]:
    """thresholds: (before, after)."""
    batch, kv_heads, count = slots.norms_BKP.shape
    tile = _tile(slots.keys_BKPC, slots.values_BKPV, rule, None)
    norms, victims = _numbers(slots.norms_BKP), victim_BK.contiguous()
    near = places = None
    if rule.kind != "drop":
        near = torch.empty(batch, kv_heads, dtype=torch.float32, device=victims.device)
        places = torch.empty_like(near, dtype=torch.int32)
        yield _launch(
            match_kernel,
            (kv_heads, batch),
            tile,
            gpu,
            4,
            norms=norms,
            dots=dots_BKP.contiguous(),
            victims=victims,
            near=near,
            places=places,
            slots=count,
            BLOCK=min(MATCHED, max(16, int(triton.next_power_of_2(count)))),
        )
    yield _launch(
        replace_kernel,
        (kv_heads, batch),
        tile,
        gpu,
        1,
        keys=strided_rows(slots.keys_BKPC),
        values=strided_rows(slots.values_BKPV),
        norms=norms,
        merge_counts=_numbers(slots.merge_counts_BKP),
        victims=victims,
        near=near,
        places=places,
        before=None if near is None else thresholds[0].contiguous(),
        after=None if near is None else thresholds[1],
        new_key=arrival.key_BKC.contiguous(),
        new_value=arrival.value_BKV.contiguous(),
        arrivals=(victim_BK if arrival.slot_BK is None else arrival.slot_BK).contiguous(),
        beta=float(rule.beta),
    )


def _launch(
    kernel: Any, grid: tuple[int, ...], tile: MergeTile, gpu: str | None, num_warps: int, **arguments: Any
) -> Launch:
    name, dtype = kernel.__name__.removesuffix("_kernel"), TYPES[_dtype(arguments)]
    kind = " drop" if arguments.get("order", 0) is None or arguments.get("near", 0) is None else ""
    return Launch(
        name=f"evict_merge {name} {dtype} C={tile.key_dim}{kind}",
        kernel=kernel,
        grid=grid,
        arguments=arguments | {"tile": tile},
        num_warps=num_warps,
        num_stages=2,
        target=architecture() if gpu is None else gpu,
    )


def _dtype(arguments: dict[str, Any]) -> torch.dtype:
    rows = arguments["keys"] if "keys" in arguments else arguments["norms"]
    dtype: torch.dtype = rows.x.dtype
    return dtype


def _numbers(x_BKS: Tensor | None) -> Numbers:
    if x_BKS is None:
        return Numbers(None, 0, 0)
    x = x_BKS if x_BKS.stride(-1) == 1 else x_BKS.contiguous()
    return Numbers(x, *x.stride()[:2])


def _tile(keys_BKSC: Tensor, values_BKSV: Tensor, rule: MergeRule, block: int | None) -> MergeTile:
    kv_heads, key_dim, value_dim = keys_BKSC.shape[1], keys_BKSC.shape[3], values_BKSV.shape[3]
    chosen = 64 if keys_BKSC.element_size() == 2 and key_dim <= 128 else 32
    return MergeTile(
        block=block or chosen,
        kv_heads=kv_heads,
        kv_heads_wide=int(triton.next_power_of_2(kv_heads)),
        key_dim=key_dim,
        key_wide=max(16, int(triton.next_power_of_2(key_dim))),
        value_dim=value_dim,
        value_wide=max(16, int(triton.next_power_of_2(value_dim))),
        paper=rule.kind == "paper",
        together=rule.together,
        widen=triton.knobs.runtime.interpret,  # its product of bfloat16 multiplies their bits (3.9)
    )
