"""The launches of decode attention: buffers, grids and arguments."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from attnzoo.ops.common.launch import TYPES, Launch
from attnzoo.ops.paged_decode.entries import Entries
from attnzoo.ops.paged_decode.kernels import (
    DecodeTile,
    Partial,
    Queries,
    Segment,
    accumulated_kernel,
    combine_kernel,
    split_kernel,
)
from attnzoo.ops.paged_decode.splits import LEAST_BLOCKS, Splits, plan_splits
from attnzoo.ops.relative_sdpa.tilings import architecture

LOG2_E = 1.4426950408889634
COMBINED = 16
"""Partial results that are loaded at once."""
MASS_BLOCK = 256
MANY = 1 << 20
"""Multiprocessors of a GPU on which programs are as small as allowed."""


@dataclass(frozen=True, kw_only=True)
class Pages:
    """Which page of a pool holds a sequence's entries: keys_BKSC and values_BKSV of a segment are then [pages, K, slots
    of a page, width], and slot s of sequence b is slot s mod page of pool page table[b, s div page]. Tables [B, I]
    (int32 or int64); positions and merge counts stay [B, K, I * page]. Slots at a position below 0 are not read:
    their dots with a probe are 0.
    """

    prefix_BI: Tensor | None = None
    tail_BI: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the entries lie, and what tests choose otherwise: `splits` (slots of a block, blocks of a program), `gpu`."""

    pages: Pages = Pages()
    splits: tuple[int, int] | None = None
    gpu: str | None = None


@dataclass(frozen=True, kw_only=True)
class Call:
    """Arguments and results of the launches."""

    queries: Queries
    prefix: Segment | None
    tail: Segment
    partial: Partial
    places_BKH: Tensor | None
    totals_BKL: Tensor | None
    out_BTNH: Tensor
    accumulated_BKS: Tensor | None
    splits: Splits
    tile: DecodeTile
    gpu: str

    @classmethod
    def of(
        cls,
        q_BNTH: Tensor,
        prefix: Entries | None,
        tail: Entries,
        query_positions_BT: Tensor,
        bias_BNTS: Tensor | None,
        probe_BKC: Tensor | None,
        accumulated_attention: bool,
        plan: Layout,
    ) -> "Call":
        batch, heads, tokens, head_dim = q_BNTH.shape
        kv_heads = tail.keys_BKSC.shape[1]
        first = None if prefix is None else _segment("prefix", prefix, plan.pages.prefix_BI, batch)
        last = _segment("tail", tail, plan.pages.tail_BI, batch)
        count = heads // kv_heads * tokens
        tile = _tile(q_BNTH, prefix, kv_heads, probe_BKC is not None)
        least = LEAST_BLOCKS
        if plan.splits is not None:
            tile, least = tile._replace(block=plan.splits[0]), plan.splits[1]
        kept, slots = 0 if first is None else first.slots, last.slots
        splits = plan_splits(
            triton.cdiv(kept, tile.block),
            triton.cdiv(slots, tile.block),
            rows=batch * kv_heads * _row_blocks(tile, count, probe_BKC is not None),
            multiprocessors=_multiprocessors(q_BNTH.device) if plan.splits is None else MANY,
            least=least,
        )

        def floats(*shape: int) -> Tensor:
            return torch.empty(batch, kv_heads, *shape, dtype=torch.float32, device=q_BNTH.device)

        partial = Partial(
            out=floats(splits.total, count, head_dim),
            log_sums=floats(splits.total, count),
            scores=floats(count, kept + slots) if accumulated_attention else None,
            dots=None if probe_BKC is None else floats(kept),
            slots=kept + slots,
        )
        return cls(
            queries=_queries(q_BNTH, query_positions_BT, bias_BNTS, probe_BKC),
            prefix=first if kept else None,
            tail=last,
            partial=partial,
            places_BKH=_places(prefix, head_dim),
            totals_BKL=floats(count) if accumulated_attention else None,
            out_BTNH=q_BNTH.new_empty(batch, tokens, heads, head_dim),
            accumulated_BKS=floats(kept + slots) if accumulated_attention else None,
            splits=splits,
            tile=tile,
            gpu=plan.gpu or architecture(),
        )

    def launches(self) -> Iterator[Launch]:
        batch, kv_heads, _, count, head_dim = self.partial.out.shape
        grid = (kv_heads, batch)
        row_blocks = _row_blocks(self.tile, count, self.queries.probe is not None)
        if self.splits.total:
            yield self._launch(
                "split",
                split_kernel,
                (self.splits.total * row_blocks, *grid),
                queries=self.queries,
                prefix=self.prefix,
                tail=self.tail,
                partial=self.partial,
                prefix_splits=self.splits.prefix,
                blocks=self.splits.blocks,
                row_blocks=row_blocks,
                scale=head_dim**-0.5 * LOG2_E,
                tile=self.tile,
            )
        yield self._launch(
            "combine",
            combine_kernel,
            (count, *grid),
            partial=self.partial,
            out=self.out_BTNH,
            totals=self.totals_BKL,
            places=self.places_BKH,
            prefix_splits=self.splits.prefix,
            splits=self.splits.total,
            tile=self.tile,
            SPLITS=COMBINED,
        )
        if self.accumulated_BKS is not None and self.partial.slots:
            yield self._launch(
                "accumulated",
                accumulated_kernel,
                (triton.cdiv(self.partial.slots, MASS_BLOCK), *grid),
                scores=self.partial.scores,
                totals=self.totals_BKL,
                accumulated=self.accumulated_BKS,
                count=count,
                slots=self.partial.slots,
                BLOCK=MASS_BLOCK,
            )

    def _launch(self, kernel: str, fn: Any, grid: tuple[int, ...], **arguments: Any) -> Launch:
        dtype, tile = self.queries.x.dtype, self.tile
        split = kernel == "split"
        return Launch(
            name=f"paged_decode {kernel} {TYPES[dtype]} H={tile.head_dim} C={tile.key_dim} rows={tile.rows}",
            kernel=fn,
            grid=grid,
            arguments=arguments,
            num_warps=_warps(tile, self.gpu) if split else max(1, tile.tail_wide // 64),
            num_stages=2,
            target=self.gpu,
        )


def _queries(q_BNTH: Tensor, query_positions_BT: Tensor, bias_BNTS: Tensor | None, probe_BKC: Tensor | None) -> Queries:
    q, at, bias = _dense(q_BNTH), _dense(query_positions_BT), None if bias_BNTS is None else _dense(bias_BNTS)
    return Queries(
        x=q,
        batch=q.stride(0),
        head=q.stride(1),
        time=q.stride(2),
        positions=at,
        positions_batch=at.stride(0),
        bias=bias,
        bias_batch=0 if bias is None else bias.stride(0),
        bias_head=0 if bias is None else bias.stride(1),
        bias_time=0 if bias is None else bias.stride(2),
        probe=None if probe_BKC is None else probe_BKC.contiguous(),
        tokens=q.shape[2],
    )


def _segment(name: str, part: Entries, table_BI: Tensor | None, batch: int) -> Segment:
    kv_heads, page = part.keys_BKSC.shape[1:3]
    slots = page
    assert part.positions_BKS is not None
    if table_BI is not None:
        if table_BI.dim() != 2 or table_BI.shape[0] != batch:
            raise ValueError(f"pages.{name}_BI {tuple(table_BI.shape)} must be [{batch}, pages of a sequence]")
        slots = table_BI.shape[1] * page
        if part.positions_BKS.shape[0] != batch or part.positions_BKS.shape[2] != slots:
            raise ValueError(
                f"{name}: positions {tuple(part.positions_BKS.shape)} must be [{batch}, K or 1, {slots}] for "
                f"{table_BI.shape[1]} pages of {page} slots"
            )
    keys, values = _dense(part.keys_BKSC), _dense(part.values_BKSV)
    positions = _dense(part.positions_BKS).expand(batch, kv_heads, slots)
    merge_counts = None if part.log_counts_BKS is None else _dense(part.log_counts_BKS)
    return Segment(
        key=keys,
        value=values,
        positions=positions,
        channels=None if part.channels_BKC is None else part.channels_BKC.contiguous(),
        log_counts=merge_counts,
        pages=None if table_BI is None else table_BI.contiguous(),
        slots=slots,
        page=page,
        key_batch=keys.stride(0),
        key_head=keys.stride(1),
        key_slot=keys.stride(2),
        value_batch=values.stride(0),
        value_head=values.stride(1),
        value_slot=values.stride(2),
        position_batch=positions.stride(0),
        position_head=positions.stride(1),
        count_batch=0 if merge_counts is None else merge_counts.stride(0),
        count_head=0 if merge_counts is None else merge_counts.stride(1),
    )


def _dense(x: Tensor) -> Tensor:
    """The last axis dense; caches are views of larger buffers and are not copied."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _places(prefix: Entries | None, head_dim: int) -> Tensor | None:
    """Where the prefix stores each channel of a value, -1 for nowhere; None when it stores all of them."""
    if prefix is None or prefix.value_channels_BKV is None:
        return None
    channels = prefix.value_channels_BKV
    order = torch.arange(channels.shape[2], device=channels.device).expand_as(channels)
    places = torch.full((*channels.shape[:2], head_dim), -1, dtype=torch.int64, device=channels.device)
    return places.scatter_(2, channels, order)


def _tile(q_BNTH: Tensor, prefix: Entries | None, kv_heads: int, probed: bool) -> DecodeTile:
    _, heads, tokens, head_dim = q_BNTH.shape
    key_dim = head_dim if prefix is None else prefix.keys_BKSC.shape[3]
    value_dim = head_dim if prefix is None else prefix.values_BKSV.shape[3]
    rows = _wide(heads // kv_heads * tokens + int(probed))
    return DecodeTile(
        rows=min(rows, _most_rows(q_BNTH.dtype, head_dim)),
        block=_block(q_BNTH.dtype, head_dim),
        kv_heads=kv_heads,
        group=heads // kv_heads,
        head_dim=head_dim,
        key_dim=key_dim,
        key_wide=_wide(key_dim),
        value_dim=value_dim,
        value_wide=_wide(value_dim),
        tail_wide=_wide(head_dim),
        widen=triton.knobs.runtime.interpret,  # its product of bfloat16 multiplies their bits (3.9)
    )


def _wide(width: int) -> int:
    """The smallest power of two that holds it, at least the smallest size of a product on tensor cores."""
    return max(16, int(triton.next_power_of_2(width)))


def _row_blocks(tile: DecodeTile, count: int, probed: bool) -> int:
    return int(triton.cdiv(count + int(probed), tile.rows))


# Sizes found by compiling ahead of time: they spill nowhere on sm_80, sm_90 and gfx942. No speed was measured, for want
# of a GPU; a step is bound by memory, and more rows than 16 only matter to several queries a sequence.
def _block(dtype: torch.dtype, head_dim: int) -> int:
    """Slots that are read at once: keys and values of two blocks take up to 64 KiB."""
    if head_dim > 128:
        return 16 if dtype == torch.float32 else 32
    return 32 if dtype == torch.float32 else 64


def _most_rows(dtype: torch.dtype, head_dim: int) -> int:
    return 16 if dtype == torch.float32 or head_dim > 128 else 32


def _warps(tile: DecodeTile, gpu: str) -> int:
    many = tile.rows > 16 and gpu != "gfx942"  # whose eight warps share registers that four need
    return 8 if many or tile.head_dim > 128 else 4


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
