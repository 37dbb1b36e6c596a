"""The launches of relative attention: buffers, grids and arguments, and the part of the gradients left to torch."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from attnzoo.ops.common.launch import TYPES, Launch
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.relative_sdpa.kernels.backward import delta_kernel, key_kernel, query_kernel, table_kernel
from attnzoo.ops.relative_sdpa.kernels.forward import forward_kernel, key_bias_kernel
from attnzoo.ops.relative_sdpa.kernels.streaming import logits_kernel, streaming_kernel
from attnzoo.ops.relative_sdpa.kernels.tiles import KeyLimits, MaskKind
from attnzoo.ops.relative_sdpa.tilings import Tiling, architecture, tiling

LOG2_E = 1.4426950408889634
QUERIES = 16
"""Queries per program when streaming: the least that tensor cores take."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is not a tensor with a gradient."""

    mask: Mask
    scale: float
    block: int | None
    future_rows: int = 0


@dataclass(frozen=True, kw_only=True)
class Operands:
    """The inputs as the kernels read them: token-major, one dtype; parameters without rounding where they are added."""

    q_BTNH: Tensor
    k_BSKH: Tensor
    v_BSKH: Tensor
    content_bias_NH: Tensor | None
    key_bias_BNS: Tensor | None
    """u . k, filled by the forward pass."""
    table_NPH: Tensor | None
    table_bias_NP: Tensor | None
    limits: KeyLimits
    plan: Options
    architecture: str

    @classmethod
    def of(cls, inputs: tuple[Tensor | None, ...], plan: Options, gpu: str | None = None) -> "Operands":
        """Copies what is laid out otherwise; not the caches of the streaming form, which kernels read as they are."""
        q, k, v, content_bias, table, table_bias = inputs
        assert q is not None
        assert k is not None
        assert v is not None
        needs_bias = content_bias is not None and plan.mask.parallel
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        return cls(
            q_BTNH=q.transpose(1, 2).contiguous(),
            k_BSKH=k.contiguous() if plan.mask.parallel else k,
            v_BSKH=v.contiguous() if plan.mask.parallel else v,
            content_bias_NH=None if content_bias is None else content_bias.contiguous(),
            key_bias_BNS=q.new_empty(*q.shape[:2], k.shape[1], dtype=torch.float32) if needs_bias else None,
            table_NPH=None if table is None else table.to(q.dtype).contiguous(),
            table_bias_NP=None if table_bias is None else table_bias.contiguous(),
            limits=_limits(plan, k.shape[1]),
            plan=plan,
            architecture=architecture() if gpu is None else gpu,
        )

    @property
    def entries(self) -> int:
        return self.k_BSKH.shape[1]

    @property
    def rows(self) -> int:
        return 1 if self.table_NPH is None else self.table_NPH.shape[1]

    @property
    def scales(self) -> tuple[float, float]:
        """(scale, scale in powers of two)."""
        return float(self.plan.scale), float(self.plan.scale) * LOG2_E

    def tiling(self, kernel: str) -> Tiling:
        with_table = self.table_NPH is not None
        head_dim, ahead = self.q_BTNH.shape[-1], self.plan.mask.ahead
        chosen = tiling(kernel, self.q_BTNH.dtype, head_dim, with_table, self.architecture, ahead)
        return chosen if self.plan.block is None else dataclasses.replace(chosen, block=self.plan.block)

    def launch(self, kernel: str, fn: Any, grid: tuple[int, ...], **arguments: Any) -> Launch:
        """The launch of `fn` with the constants that it asks for."""
        heads, head_dim = self.q_BTNH.shape[2:]
        tiles = self.tiling(kernel)
        constants = {
            "tokens": self.q_BTNH.shape[1],
            "entries": self.entries,
            "rows": self.rows,
            "limits": self.limits,
            "KIND": _kind(self.plan.mask),
            "HEADS": heads,
            "GROUP": heads // self.k_BSKH.shape[2],
            "HEAD_DIM": head_dim,
            "WIDTH": max(16, triton.next_power_of_2(head_dim)),
            "BLOCK": tiles.block,
            "turn": tiles.block,
            "QUERIES": QUERIES,
        }
        arguments |= {name: value for name, value in constants.items() if name in fn.arg_names}
        with_table = "" if self.table_NPH is None else f" P={self.rows}"
        mask = self.plan.mask
        ahead = "" if not mask.ahead else " prefix" if mask.causal else " full"
        return Launch(
            name=f"relative_sdpa {kernel} {TYPES[self.q_BTNH.dtype]} H={head_dim}{with_table}{ahead}",
            kernel=fn,
            grid=grid,
            arguments=arguments,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            target=self.architecture,
        )

    def blocks(self, kernel: str) -> int:
        """How many blocks of queries the kernel works on."""
        return triton.cdiv(self.q_BTNH.shape[1], self.tiling(kernel).block)

    def key_blocks(self, kernel: str) -> int:
        """How many blocks of keys the kernel works on."""
        return triton.cdiv(self.entries, self.tiling(kernel).block)

    def table_blocks(self) -> int:
        """How many blocks of distances have rows of the table that `table_kernel` owns: after the first, where that is
        for keys far ahead, and before the last."""
        block, future = self.tiling("table").block, self.plan.future_rows
        ahead = triton.cdiv(future - 1, block) if future else 0
        return ahead + triton.cdiv(self.rows - 1 - future, block)

    def inputs(self) -> dict[str, Tensor | None]:
        return {
            "q": self.q_BTNH,
            "k": self.k_BSKH,
            "v": self.v_BSKH,
            "key_bias": self.key_bias_BNS,
            "table": self.table_NPH,
            "table_bias": self.table_bias_NP,
        }

    def first_blocks(self, kernel: str) -> Tensor | None:
        """first_BI: the first key block that each query block looks at, where starts say so."""
        if self.limits.starts is None:
            return None
        block, count = self.tiling(kernel).block, self.blocks(kernel)
        tokens = self.limits.starts.shape[1]
        padded = F.pad(self.limits.starts, (0, count * block - tokens), value=tokens)
        return padded.unflatten(1, (count, block)).amin(2) // block

    def last_blocks(self, kernel: str) -> Tensor | None:
        """last_BJ: the last query block that looks at each key block. Starts need not rise (right padding)."""
        first_BI = self.first_blocks(kernel)
        if first_BI is None:
            return None
        index = torch.arange(first_BI.shape[1], device=first_BI.device, dtype=torch.int32)
        looks_BIJ = (first_BI[:, :, None] <= index) & (index <= index[:, None])
        return torch.where(looks_BIJ, index[:, None], -1).amax(1)

    def active_blocks(self, kernel: str) -> dict[str, Tensor | None]:
        """Per row and block of distances, the query blocks that look that far, first in active_blocks [B, D, I]."""
        first_BI = self.first_blocks(kernel)
        if first_BI is None:
            return {"active_blocks": None, "active_counts": None}
        index = torch.arange(first_BI.shape[1], device=first_BI.device, dtype=torch.int32)
        looks_BDI = (index - first_BI)[:, None] >= index[:, None]
        order = looks_BDI.to(torch.int8).argsort(dim=2, descending=True, stable=True)
        return {"active_blocks": order.to(torch.int32), "active_counts": looks_BDI.sum(2, dtype=torch.int32)}


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What the forward pass leaves for the backward pass: its result, log2 of the sums, the far keys' relative term."""

    out_BTNH: Tensor
    log_sums_BNT: Tensor
    far_BNT: Tensor | None

    @classmethod
    def empty(cls, operands: Operands) -> "Saved":
        out_BTNH = torch.empty_like(operands.q_BTNH)
        log_sums_BNT = _per_query(operands)
        far_BNT = None if operands.table_NPH is None else torch.empty_like(log_sums_BNT)
        return cls(out_BTNH=out_BTNH, log_sums_BNT=log_sums_BNT, far_BNT=far_BNT)

    def launches(self, operands: Operands) -> Iterator[Launch]:
        """The launches that fill it."""
        batch, _, heads, _ = self.out_BTNH.shape
        if operands.key_bias_BNS is not None:
            yield operands.launch(
                "key_bias",
                key_bias_kernel,
                (operands.key_blocks("key_bias"), heads, batch),
                k=operands.k_BSKH,
                content_bias=operands.content_bias_NH,
                key_bias=operands.key_bias_BNS,
            )
        yield operands.launch(
            "forward",
            forward_kernel,
            (operands.blocks("forward"), heads, batch),
            **operands.inputs(),
            first_blocks=operands.first_blocks("forward"),
            out=self.out_BTNH,
            log_sums=self.log_sums_BNT,
            far=self.far_BNT,
            scale=operands.scales[1],
        )


def _limits(plan: Options, entries: int) -> KeyLimits:
    mask = plan.mask
    starts, prefix, keys = mask.starts_BT, mask.prefix_B, mask.keys_BS
    if prefix is not None and mask.parallel:
        prefix = prefix.clamp(max=entries)
    return KeyLimits(
        starts=None if starts is None else starts.to(torch.int32).contiguous(),
        prefix=None if prefix is None else prefix.to(torch.int32).contiguous(),
        exists=None if keys is None else keys.to(torch.int8).contiguous(),
        entries=entries,
        future=plan.future_rows or None,
    )


def _kind(mask: Mask) -> MaskKind:
    partial = mask.ahead or mask.keys_BS is not None or not mask.parallel
    return MaskKind(window=mask.window or 0, sinks=mask.sinks, causal=mask.causal, ahead=mask.ahead, partial=partial)


def _per_query(operands: Operands) -> Tensor:
    """An empty float32 [B, N, T]."""
    batch, tokens, heads, _ = operands.q_BTNH.shape
    return torch.empty(batch, heads, tokens, dtype=torch.float32, device=operands.q_BTNH.device)


class Gradients:
    """The backward pass: buffers, the launches that fill them, and what is left to torch."""

    def __init__(self, operands: Operands, saved: Saved, out_grad_BTNH: Tensor) -> None:
        self.operands, self.saved, self.out_grad_BTNH = operands, saved, out_grad_BTNH
        self.delta_BNT = _per_query(operands)
        self.q_BTNH = torch.empty_like(operands.q_BTNH)
        self.k_BTKH = torch.empty_like(operands.k_BSKH)
        self.v_BTKH = torch.empty_like(operands.v_BSKH)
        self.content_BNS = None if operands.key_bias_BNS is None else torch.empty_like(operands.key_bias_BNS)
        self.far_BNT = self.ahead_BNT = self.table_NPH = self.table_bias_NP = None
        if operands.table_NPH is not None:
            self.far_BNT = _per_query(operands)
            self.ahead_BNT = _per_query(operands) if operands.plan.future_rows else None
            self.table_NPH = torch.empty_like(operands.table_NPH, dtype=torch.float32)
            self.table_bias_NP = torch.empty(self.table_NPH.shape[:2], dtype=torch.float32, device=self.q_BTNH.device)

    def launches(self) -> Iterator[Launch]:
        operands, saved = self.operands, self.saved
        batch, _, heads, _ = self.q_BTNH.shape
        yield operands.launch(
            "delta",
            delta_kernel,
            (operands.blocks("delta"), heads, batch),
            out=saved.out_BTNH,
            out_grad=self.out_grad_BTNH,
            delta=self.delta_BNT,
        )
        shared = {
            **operands.inputs(),
            "out_grad": self.out_grad_BTNH,
            "log_sums": saved.log_sums_BNT,
            "delta": self.delta_BNT,
            "scale": operands.scales[0],
            "score_scale": operands.scales[1],
        }
        yield operands.launch(
            "query",
            query_kernel,
            (operands.blocks("query"), heads, batch),
            **shared,
            first_blocks=operands.first_blocks("query"),
            far=saved.far_BNT,
            q_grad=self.q_BTNH,
            far_grad=self.far_BNT,
            ahead_grad=self.ahead_BNT,
        )
        yield operands.launch(
            "key",
            key_kernel,
            (operands.key_blocks("key"), self.k_BTKH.shape[2], batch),
            **shared,
            last_blocks=operands.last_blocks("key"),
            content_bias=operands.content_bias_NH,
            far=saved.far_BNT,
            k_grad=self.k_BTKH,
            v_grad=self.v_BTKH,
            content_grad=self.content_BNS,
        )
        if operands.table_NPH is not None and operands.table_blocks():
            yield operands.launch(
                "table",
                table_kernel,
                (operands.table_blocks(), heads),
                **shared,
                **operands.active_blocks("table"),
                table_grad=self.table_NPH,
                bias_grad=self.table_bias_NP,
                batches=batch,
            )

    def finish(self) -> tuple[Tensor | None, ...]:
        """Gradients in the order of the inputs. The last row of the table is the sum over all far keys, and the first
        that over all far ahead, where there are rows for them."""
        operands, scale = self.operands, self.operands.plan.scale
        content_NH = None
        if self.content_BNS is not None:
            grouped_BKGS = self.content_BNS.unflatten(1, (self.k_BTKH.shape[2], -1))
            content_NH = torch.einsum("bkgs,bskh->kgh", grouped_BKGS, operands.k_BSKH.float()).flatten(0, 1) * scale
        if self.table_NPH is not None and self.table_bias_NP is not None:
            for row, sums_BNT in ((-1, self.far_BNT), (0, self.ahead_BNT)):
                if sums_BNT is not None:
                    product_NH = torch.einsum("bnt,btnh->nh", sums_BNT, operands.q_BTNH.float())
                    self.table_NPH[:, row] = product_NH * scale
                    self.table_bias_NP[:, row] = sums_BNT.sum((0, 2)) * scale
        token_major = (self.q_BTNH, self.k_BTKH, self.v_BTKH)
        return (*(x.transpose(1, 2) for x in token_major), content_NH, self.table_NPH, self.table_bias_NP)


def streaming_launches(operands: Operands, out_BTNH: Tensor) -> Iterator[Launch]:
    """The product with the whole table once, then attention that looks distances up in it."""
    batch, tokens, heads, _ = out_BTNH.shape
    mask, k, v = operands.plan.mask, operands.k_BSKH, operands.v_BSKH
    entries, kv_heads = k.shape[1:3]
    assert mask.query_positions_BT is not None
    assert mask.key_positions_BKS is not None
    query_positions = mask.query_positions_BT.contiguous().expand(batch, tokens)
    key_positions = mask.key_positions_BKS.contiguous().expand(batch, kv_heads, entries)
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    logits = None
    if operands.table_NPH is not None:
        logits = torch.empty(batch, heads, tokens, operands.rows, dtype=torch.float32, device=out_BTNH.device)
        yield operands.launch(
            "logits",
            logits_kernel,
            (triton.cdiv(operands.rows, operands.tiling("logits").block), heads, batch),
            q=operands.q_BTNH,
            table=operands.table_NPH,
            table_bias=operands.table_bias_NP,
            logits=logits,
        )
    yield operands.launch(
        "streaming",
        streaming_kernel,
        (triton.cdiv(tokens, QUERIES), heads, batch),
        q=operands.q_BTNH,
        k=k,
        v=v,
        content_bias=operands.content_bias_NH,
        logits=logits,
        query_positions=query_positions,
        key_positions=key_positions,
        out=out_BTNH,
        scale=operands.scales[1],
        k_batch=k.stride(0),
        k_step=k.stride(1),
        k_head=k.stride(2),
        v_batch=v.stride(0),
        v_step=v.stride(1),
        v_head=v.stride(2),
        query_positions_batch=query_positions.stride(0),
        key_positions_batch=key_positions.stride(0),
        key_positions_head=key_positions.stride(1),
    )
