"""The launches of accumulated_attention: which queries are dealt with together, which blocks see which, buffers and
arguments."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from attnzoo.ops.accumulated_attention.kernels import Scores, ScoreTile, columns_kernel, log_sums_kernel
from attnzoo.ops.common.launch import TYPES, Launch
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.common.strided import strided_rows
from attnzoo.ops.common.tables import Tables
from attnzoo.ops.relative_sdpa.kernels.streaming import logits_kernel
from attnzoo.ops.relative_sdpa.tilings import architecture, tiling

LOG2_E = 1.4426950408889634
LOGITS_BYTES = 64 << 20
"""Logits by distance, where there are tables: as many queries at once as fit."""
QUERIES = 16
"""Queries that the kernel of logits takes at once."""
NOWHERE = 1 << 62
"""Later than all positions, and a number that torch's padding, which takes a float, does not change."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buffers:
    """The result, sums of rows that are known (log2), and what tests choose otherwise: size of tiles, GPU."""

    accumulated_BKS: Tensor
    log_sums_BNT: Tensor | None = None
    block: int | None = None
    gpu: str | None = None


def launches(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    mask: Mask,
    counts_B: Tensor | None,
    tables: Tables | None,
    log_counts_BKS: Tensor | None,
    scale: float,
    plan: Buffers,
) -> Iterator[Launch]:
    """What adds to `plan.accumulated_BKS`, a part of the queries after the other where tables ask for logits."""
    batch, heads, tokens, _ = q_BNTH.shape
    gpu, log_sums_BNT = plan.gpu or architecture(), plan.log_sums_BNT
    queries_BT, keys_BKS = (
        x.expand(batch, *x.shape[1:]) for x in mask.positions(tokens, k_BKSH.shape[2], q_BNTH.device)
    )
    if counts_B is not None:
        steps_T = torch.arange(tokens, device=q_BNTH.device)
        queries_BT = queries_BT.masked_fill(steps_T >= counts_B[:, None], -1)
    content_BNTH = q_BNTH if tables is None else (q_BNTH + tables.content_bias_NH[:, None]).to(q_BNTH.dtype)
    common = _common(k_BKSH, keys_BKS, log_counts_BKS, scale)
    part = tokens
    if tables is not None:
        row = 4 * batch * heads * tables.table_bias_NP.shape[1]
        part = max(QUERIES, LOGITS_BYTES // row // QUERIES * QUERIES)
    for first in range(0, tokens, part):
        rows = slice(first, min(first + part, tokens))
        logits = None
        if tables is not None:
            logits = _empty_logits(q_BNTH[:, :, rows], tables)
            yield _logits_launch(q_BNTH[:, :, rows], tables, logits, gpu)
        yield from QueryBlock.of(
            content_BNTH[:, :, rows],
            queries_BT[:, rows],
            keys_BKS,
            mask,
            common,
            logits,
            None if log_sums_BNT is None else log_sums_BNT[:, :, rows],
            plan.block,
            gpu,
        ).launches(plan.accumulated_BKS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryBlock:
    """Queries that are dealt with together, and which blocks see which."""

    scores: Scores
    tile: ScoreTile
    log_sums_BNT: Tensor
    known: bool
    reach_BKI: Tensor
    begins_BKJ: Tensor
    gpu: str

    @classmethod
    def of(
        cls,
        q_BNTH: Tensor,
        queries_BT: Tensor,
        keys_BKS: Tensor,
        mask: Mask,
        common: dict[str, Any],
        logits_BNTP: Tensor | None,
        log_sums_BNT: Tensor | None,
        block: int | None,
        gpu: str,
    ) -> "QueryBlock":
        queries = strided_rows(q_BNTH)
        scores = Scores(
            queries=queries,
            at_queries=queries_BT.contiguous(),
            relative=logits_BNTP,
            distances=1 if logits_BNTP is None else logits_BNTP.shape[3],
            tokens=q_BNTH.shape[2],
            **common,
        )
        tile = _tile(q_BNTH, common["keys"].x.shape[1], mask, logits_BNTP is not None, block)
        reach_BKI, begins_BKJ = visible_blocks(queries_BT, keys_BKS, tile.rows, tile.columns)
        shape = (q_BNTH.shape[0], common["keys"].x.shape[1])
        known = log_sums_BNT is not None
        if log_sums_BNT is None:
            log_sums_BNT = torch.empty(q_BNTH.shape[:3], dtype=torch.float32, device=q_BNTH.device)
        return cls(
            scores=scores,
            tile=tile,
            log_sums_BNT=log_sums_BNT if log_sums_BNT.stride(-1) == 1 else log_sums_BNT.contiguous(),
            known=known,
            reach_BKI=reach_BKI.expand(*shape, -1).contiguous(),
            begins_BKJ=begins_BKJ.expand(*shape, -1).contiguous(),
            gpu=gpu,
        )

    def launches(self, accumulated_BKS: Tensor) -> Iterator[Launch]:
        batch, heads, _ = self.log_sums_BNT.shape
        if not self.known:
            yield self._launch(
                log_sums_kernel,
                (self.reach_BKI.shape[2], heads, batch),
                reach=self.reach_BKI,
                log_sums=self.log_sums_BNT,
            )
        yield self._launch(
            columns_kernel,
            (self.begins_BKJ.shape[2], accumulated_BKS.shape[1], batch),
            log_sums=self.log_sums_BNT,
            log_sums_batch=self.log_sums_BNT.stride(0),
            log_sums_head=self.log_sums_BNT.stride(1),
            begins=self.begins_BKJ,
            accumulated=accumulated_BKS,
        )

    def _launch(self, kernel: Any, grid: tuple[int, ...], **arguments: Any) -> Launch:
        dtype = self.scores.queries.x.dtype
        single = dtype == torch.float32
        wide = self.tile.head_dim > 128 or self.scores.relative is None
        eight = self.gpu != "gfx942" if single else not wide
        relative = "" if self.scores.relative is None else f" P={self.scores.distances}"
        pass_name = kernel.__name__.removesuffix("_kernel")
        return Launch(
            name=f"accumulated_attention {pass_name} {TYPES[dtype]} H={self.tile.head_dim}{relative}",
            kernel=kernel,
            grid=grid,
            arguments=arguments | {"scores": self.scores, "tile": self.tile},
            num_warps=8 if eight else 4,
            num_stages=1 if single else 2,
            target=self.gpu,
        )


def _common(k_BKSH: Tensor, keys_BKS: Tensor, log_counts_BKS: Tensor | None, scale: float) -> dict[str, Any]:
    """The fields of Scores that are of the keys."""
    batch, kv_heads, slots, _ = k_BKSH.shape
    places = keys_BKS if keys_BKS.stride(-1) == 1 else keys_BKS.contiguous()
    places = places.expand(batch, kv_heads, slots)
    merge_counts = (
        log_counts_BKS if log_counts_BKS is None or log_counts_BKS.stride(-1) == 1 else log_counts_BKS.contiguous()
    )
    return {
        "keys": strided_rows(k_BKSH),
        "at_keys": places,
        "at_batch": places.stride(0),
        "at_head": places.stride(1),
        "merge_counts": merge_counts,
        "count_batch": 0 if merge_counts is None else merge_counts.stride(0),
        "count_head": 0 if merge_counts is None else merge_counts.stride(1),
        "slots": slots,
        "scale": scale * LOG2_E,
        "count_scale": LOG2_E,
    }


def visible_blocks(queries_BT: Tensor, keys_BKS: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """(reach_BKI, begins_BKJ) in int32: exact where positions ascend, and never too few blocks."""
    latest_BI = _blocks(queries_BT, rows, -1).amax(-1)
    earliest_BKJ = _blocks(keys_BKS.where(keys_BKS >= 0, NOWHERE), columns, NOWHERE).amin(-1)
    # Least from here on, and greatest up to here: they ascend, so that a search finds the last block and the first.
    from_here_BKJ = earliest_BKJ.flip(-1).cummin(-1).values.flip(-1).contiguous()
    up_to_BKI = latest_BI.cummax(-1).values[:, None].expand(-1, keys_BKS.shape[1], -1).contiguous()
    latest_BKI = latest_BI[:, None].expand_as(up_to_BKI).contiguous()
    reach_BKI = torch.searchsorted(from_here_BKJ, latest_BKI, right=True, out_int32=True)
    begins_BKJ = torch.searchsorted(up_to_BKI, earliest_BKJ.contiguous(), out_int32=True)
    return reach_BKI, begins_BKJ


def _blocks(x: Tensor, block: int, other: int) -> Tensor:
    """The last axis in blocks."""
    return F.pad(x, (0, -x.shape[-1] % block), value=other).unflatten(-1, (-1, block))


def _tile(q_BNTH: Tensor, kv_heads: int, mask: Mask, relative: bool, block: int | None) -> ScoreTile:
    heads, head_dim = q_BNTH.shape[1], q_BNTH.shape[3]
    block = block or _block(q_BNTH.dtype, head_dim, relative)
    return ScoreTile(
        rows=block,
        columns=block,
        heads=heads,
        group=heads // kv_heads,
        head_dim=head_dim,
        wide=max(16, int(triton.next_power_of_2(head_dim))),
        window=mask.window or 0,
        sinks=mask.sinks,
        widen=triton.knobs.runtime.interpret,  # its product of bfloat16 multiplies their bits (3.9)
    )


def _block(dtype: torch.dtype, head_dim: int, relative: bool) -> int:
    """Queries and keys of a tile, found by compiling ahead of time: they spill nowhere on sm_80, sm_90 and gfx942."""
    if dtype == torch.float32:
        return 16
    if head_dim > 128:
        return 16 if relative else 32
    return 32 if relative else 64


def _empty_logits(q_BNTH: Tensor, tables: Tables) -> Tensor:
    shape = (*q_BNTH.shape[:3], tables.table_bias_NP.shape[1])
    return torch.empty(shape, dtype=torch.float32, device=q_BNTH.device)


def _logits_launch(q_BNTH: Tensor, tables: Tables, logits_BNTP: Tensor, gpu: str) -> Launch:
    """q . R[d] + S[d] of every query and distance."""
    dtype = torch.float32 if triton.knobs.runtime.interpret else q_BNTH.dtype  # see ScoreTile.widen
    heads, head_dim, distances = q_BNTH.shape[1], q_BNTH.shape[3], logits_BNTP.shape[3]
    tiles = tiling("logits", dtype, head_dim, True, gpu)
    return Launch(
        name=f"accumulated_attention logits {TYPES[dtype]} H={head_dim} P={distances}",
        kernel=logits_kernel,
        grid=(int(triton.cdiv(distances, tiles.block)), heads, q_BNTH.shape[0]),
        arguments={
            "q": q_BNTH.to(dtype).transpose(1, 2).contiguous(),
            "table": tables.table_NPH.to(dtype).contiguous(),
            "table_bias": tables.table_bias_NP.contiguous(),
            "logits": logits_BNTP,
            "tokens": q_BNTH.shape[2],
            "rows": distances,
            "HEADS": heads,
            "HEAD_DIM": head_dim,
            "WIDTH": max(16, int(triton.next_power_of_2(head_dim))),
            "QUERIES": QUERIES,
            "BLOCK": tiles.block,
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        target=gpu,
    )
