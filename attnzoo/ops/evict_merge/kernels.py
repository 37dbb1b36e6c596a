"""Kernels: the nearest kept keys, and the merged entries, each summed by one program in the order of the entries.

Without atomics, so that runs agree bit for bit. Cosines are products of stored keys, summed in float32, over norms.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

E = tl.constexpr(2.718281828459045)


class Numbers(NamedTuple):
    """A tensor [B, K, S] with its strides; slots are dense. x may be None."""

    x: Any
    batch: Any
    head: Any


class MergeTile(NamedTuple):
    """Compile-time sizes; `wide` ones are powers of two that hold the others. block: of entries and of kept ones."""

    block: int
    kv_heads: int
    kv_heads_wide: int
    key_dim: int
    key_wide: int
    value_dim: int
    value_wide: int
    paper: bool
    together: bool
    widen: bool


@triton.jit
def _load(rows, b, k, slot, real, width, WIDE: tl.constexpr):
    """Rows [slot, column], zero where there is none."""
    column = tl.arange(0, WIDE)
    at = rows.x + b * rows.batch + k * rows.head + slot.to(tl.int64)[:, None] * rows.row + column[None, :]
    return tl.load(at, mask=real[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def _inverse_norms(keys):
    """One over the norm of each row, 0 for a row of zeros."""
    wide = keys.to(tl.float32)
    squares = tl.sum(wide * wide, axis=1)
    return tl.where(squares > 0.0, 1.0 / tl.sqrt_rn(tl.where(squares > 0.0, squares, 1.0)), 0.0)


@triton.jit
def nearest_kernel(keys, evict, source, near, places, slots, kept, tile: tl.constexpr):
    """Grid (blocks of entries, K, B). Writes near [B, K, S], the largest cosine of an evicted entry with a kept key
    (-inf: none), and places [B, K, S], the lowest kept entry that has it. source [B, K, M]: kept slots."""
    slot = tl.program_id(0) * tile.block + tl.arange(0, tile.block)
    k, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = b * tile.kv_heads + k
    leaves = tl.load(evict + head * slots + slot, mask=slot < slots, other=0) != 0
    gone = _load(keys, b, k, slot, leaves, tile.key_dim, tile.key_wide)
    gone_scale = _inverse_norms(gone)
    best = tl.full([tile.block], -float("inf"), tl.float32)
    place = tl.zeros([tile.block], tl.int32)
    blocks = tl.max(leaves.to(tl.int32), axis=0) * tl.cdiv(kept, tile.block)  # none where nothing leaves
    for block in range(blocks):
        kept_slot = block * tile.block + tl.arange(0, tile.block)
        origin = tl.load(source + head * kept + kept_slot, mask=kept_slot < kept, other=-1)
        stays = _load(keys, b, k, origin, origin >= 0, tile.key_dim, tile.key_wide)
        scale = _inverse_norms(stays)
        if tile.widen:
            product = tl.dot(gone.to(tl.float32), tl.trans(stays.to(tl.float32)), input_precision="ieee")
        else:
            product = tl.dot(gone, tl.trans(stays), input_precision="ieee")
        cosines = tl.where((scale > 0.0)[None, :], product * gone_scale[:, None] * scale[None, :], -float("inf"))
        highest = tl.max(cosines, axis=1)
        first = tl.min(tl.where(cosines == highest[:, None], kept_slot[None, :], 2147483647), axis=1)
        nearer = highest > best
        place = tl.where(nearer, first, place)
        best = tl.where(nearer, highest, best)
    tl.store(near + head * slots + slot, tl.where(leaves, best, -float("inf")), mask=slot < slots)
    tl.store(places + head * slots + slot, place, mask=slot < slots)


@triton.jit
def merge_kernel(
    keys, values, merge_counts, source, order, offsets, weights, new_keys, new_values, new_counts, slots, kept,
    tile: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (M, K, B): one kept entry m and those merged into it: order[offsets[m]], ..., order[offsets[m + 1] - 1].

    Without `order`, and for an entry that nothing is merged into, rows are copied unchanged.
    """
    m, k, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = b * tile.kv_heads + k
    one = tl.arange(0, 1)
    origin = tl.load(source + head * kept + m + one)
    key = _load(keys, b, k, origin, origin >= 0, tile.key_dim, tile.key_wide)
    value = _load(values, b, k, origin, origin >= 0, tile.value_dim, tile.value_wide)
    counts_at = b * merge_counts.batch + k * merge_counts.head
    own = tl.full([1], 1.0, tl.float32)
    if merge_counts.x is not None:
        own = tl.load(merge_counts.x + counts_at + origin, mask=origin >= 0, other=0.0).to(tl.float32)
    if order is not None:
        begin, end = tl.load(offsets + head * (kept + 1) + m), tl.load(offsets + head * (kept + 1) + m + 1)
        scale = own * E if tile.paper else own
        key_sum = scale[:, None] * key.to(tl.float32)
        value_sum = scale[:, None] * value.to(tl.float32)
        weight_sum, count_sum = tl.zeros([1], tl.float32), tl.zeros([1], tl.float32)
        for first in range(begin, end, CHUNK):
            at = first + tl.arange(0, CHUNK)
            there = at < end
            entry = tl.load(order + head * slots + at, mask=there, other=0)
            weight = tl.load(weights + head * slots + entry, mask=there, other=0.0)
            rows = _load(keys, b, k, entry, there, tile.key_dim, tile.key_wide).to(tl.float32)
            key_sum += tl.sum(rows * weight[:, None], axis=0)[None, :]
            rows = _load(values, b, k, entry, there, tile.value_dim, tile.value_wide).to(tl.float32)
            value_sum += tl.sum(rows * weight[:, None], axis=0)[None, :]
            counts = there.to(tl.float32)
            if merge_counts.x is not None:
                counts = tl.load(merge_counts.x + counts_at + entry, mask=there, other=0.0).to(tl.float32)
            weight_sum += tl.sum(weight, axis=0)
            count_sum += tl.sum(counts, axis=0)
        total = scale + weight_sum if tile.paper else scale + count_sum
        if end > begin:
            key = (key_sum / total[:, None]).to(key.dtype)
            value = (value_sum / total[:, None]).to(value.dtype)
            own += count_sum
    column = tl.arange(0, tile.key_wide)[None, :]
    new_at = (head * kept + m + one)[:, None]
    tl.store(new_keys + new_at * tile.key_dim + column, key, mask=column < tile.key_dim)
    column = tl.arange(0, tile.value_wide)[None, :]
    tl.store(new_values + new_at * tile.value_dim + column, value, mask=column < tile.value_dim)
    if new_counts is not None:
        tl.store(new_counts + head * kept + m + one, own.to(new_counts.dtype.element_ty))


@triton.jit
def match_kernel(norms, dots, victims, near, places, slots, tile: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (K, B). Writes the cosine of each victim with its nearest entry (-inf: none) and that entry's slot."""
    k, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head = b * tile.kv_heads + k
    victim = tl.load(victims + head)
    norms_at = norms.x + b * norms.batch + k * norms.head
    own = tl.load(norms_at + tl.maximum(victim, 0)).to(tl.float32)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    place = tl.zeros([BLOCK], tl.int32)
    for first in range(0, slots, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        norm = tl.load(norms_at + slot, mask=slot < slots, other=0.0).to(tl.float32)
        norm = tl.where(slot == victim, 0.0, norm)
        dot = tl.load(dots + head * slots + slot, mask=slot < slots, other=0.0)
        ratio = tl.where(norm > 0.0, dot / tl.where(norm > 0.0, norm, 1.0), -float("inf"))
        place = tl.where(ratio > best, slot, place)
        best = tl.maximum(best, ratio)
    highest = tl.max(best, axis=0)
    place = tl.min(tl.where(best == highest, place, 2147483647), axis=0)
    cosine = tl.where(own > 0.0, highest / tl.where(own > 0.0, own, 1.0), tl.minimum(highest, 0.0))
    tl.store(near + head, tl.where(victim >= 0, cosine, -float("inf")))
    tl.store(places + head, place)


@triton.jit
def _merge_victim(keys, values, norms, merge_counts, place, victim, near, b, k, tile):
    """Merges the victim's row into that of its nearest entry."""
    counts_at = b * merge_counts.batch + k * merge_counts.head
    own, count = 1.0, 1.0
    if merge_counts.x is not None:
        own = tl.load(merge_counts.x + counts_at + place).to(tl.float32)
        count = tl.load(merge_counts.x + counts_at + victim).to(tl.float32)
    scale, weight = own, near * count
    total = own + count
    if tile.paper:
        scale, weight = own * E, tl.exp(near) * count
        total = scale + weight
    one = tl.arange(0, 1)
    kept, gone = one + place, one + victim
    real = kept >= 0
    key = _load(keys, b, k, kept, real, tile.key_dim, tile.key_wide).to(tl.float32) * scale
    key += _load(keys, b, k, gone, real, tile.key_dim, tile.key_wide).to(tl.float32) * weight
    key = (key / total).to(keys.x.dtype.element_ty)
    value = _load(values, b, k, kept, real, tile.value_dim, tile.value_wide).to(tl.float32) * scale
    value += _load(values, b, k, gone, real, tile.value_dim, tile.value_wide).to(tl.float32) * weight
    value = (value / total).to(values.x.dtype.element_ty)
    tl.debug_barrier()  # every thread has read before any writes
    _store(keys, b, k, kept, key, tile.key_dim, tile.key_wide)
    _store(values, b, k, kept, value, tile.value_dim, tile.value_wide)
    _store_norm(norms, b, k, kept, key)
    if merge_counts.x is not None:
        tl.store(merge_counts.x + counts_at + place, (own + count).to(merge_counts.x.dtype.element_ty))


@triton.jit
def _store(rows, b, k, slot, new, width, WIDE: tl.constexpr):
    column = tl.arange(0, WIDE)
    at = rows.x + b * rows.batch + k * rows.head + slot.to(tl.int64)[:, None] * rows.row + column[None, :]
    tl.store(at, new, mask=(column < width)[None, :])


@triton.jit
def _store_norm(norms, b, k, slot, key):
    wide = key.to(tl.float32)
    norm = tl.sqrt_rn(tl.sum(wide * wide, axis=1))
    tl.store(norms.x + b * norms.batch + k * norms.head + slot, norm.to(norms.x.dtype.element_ty))


@triton.jit
def replace_kernel(
    keys, values, norms, merge_counts, victims, near, places, before, after, new_key, new_value, arrivals, beta,
    tile: tl.constexpr,
):  # fmt: skip
    """Grid (K, B). Merges the victim (not without `near`) and writes the arrival into its slot."""
    k, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head = b * tile.kv_heads + k
    victim = tl.load(victims + head)
    slot = tl.load(arrivals + head)
    if near is not None:
        own = tl.load(near + head)
        decisive = own
        if tile.together:
            heads = tl.arange(0, tile.kv_heads_wide)
            all_near = tl.load(near + b * tile.kv_heads + heads, mask=heads < tile.kv_heads, other=0.0)
            decisive = tl.sum(all_near, axis=0) / tile.kv_heads
        old = tl.load(before + head)
        new = tl.where(old == old, beta * decisive + (1.0 - beta) * old, decisive)
        new = tl.where(decisive > -float("inf"), new, old)
        tl.store(after + head, new)
        if (decisive >= new) & (own > -float("inf")):
            _merge_victim(keys, values, norms, merge_counts, tl.load(places + head), victim, own, b, k, tile)
    tl.debug_barrier()
    if victim >= 0:
        tl.store(
            norms.x + b * norms.batch + k * norms.head + victim, tl.zeros([], tl.float32).to(norms.x.dtype.element_ty)
        )
    tl.debug_barrier()
    if slot >= 0:
        place = tl.arange(0, 1) + slot
        column = tl.arange(0, tile.key_wide)[None, :]
        key = tl.load(new_key + head * tile.key_dim + column, mask=column < tile.key_dim, other=0.0)
        _store(keys, b, k, place, key, tile.key_dim, tile.key_wide)
        column = tl.arange(0, tile.value_wide)[None, :]
        value = tl.load(new_value + head * tile.value_dim + column, mask=column < tile.value_dim, other=0.0)
        _store(values, b, k, place, value, tile.value_dim, tile.value_wide)
        _store_norm(norms, b, k, place, key)
        if merge_counts.x is not None:
            tl.store(
                merge_counts.x + b * merge_counts.batch + k * merge_counts.head + place,
                tl.full([1], 1.0, merge_counts.x.dtype.element_ty),
            )
