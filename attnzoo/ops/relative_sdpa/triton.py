"""Relative attention on a GPU: softmax over tiles in one pass, with the relative term made inside each tile.

The tiling is FlashAttention's (Dao 2023, arXiv 2307.08691); what is added is the relative term of a tile, which costs
one product with the table forward and no memory beyond the tile (see kernels/tiles). Without a table it is plain
attention. Gradients use no atomic additions, so a run is repeatable bit by bit.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from attnzoo.ops.common.first_order import first_order
from attnzoo.ops.common.launch import Launch
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.common.tables import Tables
from attnzoo.ops.relative_sdpa.launch import Gradients, Operands, Options, Saved, streaming_launches
from attnzoo.ops.relative_sdpa.tilings import ARCHITECTURES

WIDEST_HEAD = 256


def relative_sdpa_triton(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    tables: Tables | None,
    mask: Mask,
    scale: float,
    block: int | None = None,
) -> Tensor:
    """o_BNTH; differentiable in the parallel form, forward only with positions.

    `block` replaces the chosen tile size (a power of two, at least 16): tests on tiny shapes use it. Raises ValueError
    for what the kernels cannot do: other dtypes, heads wider than 256, values not as wide as keys, pairs, gradients
    with positions.
    """
    inputs: tuple[Tensor | None, ...] = (q_BNTH, k_BKSH, v_BKSH, None, None, None)
    future_rows = 0
    if tables is not None:
        tables = tables if mask.ahead else tables.past()
        inputs = (*inputs[:3], tables.content_bias_NH, tables.table_NPH, tables.table_bias_NP)
        future_rows = tables.future_rows
    _check(inputs, mask)
    if not k_BKSH.shape[2]:  # no key, no program: zeros
        return (q_BNTH @ k_BKSH[:, :1].mT) @ v_BKSH[:, :1]
    plan = Options(mask=mask, scale=scale, block=block, future_rows=future_rows)
    if mask.parallel:
        out_BNTH: Tensor = _Attend.apply(*inputs, plan)
        return out_BNTH
    with torch.no_grad():
        operands = Operands.of(inputs, plan)
        out_BTNH = torch.empty_like(operands.q_BTNH)
        for launch in streaming_launches(operands, out_BTNH):
            launch()
    return out_BTNH.transpose(1, 2)


def _check(inputs: tuple[Tensor | None, ...], mask: Mask) -> None:
    q, k, v = inputs[:3]
    assert q is not None
    assert k is not None
    assert v is not None
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16) or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"impl='triton' takes q, k and v all in float32, bfloat16 or float16, not {q.dtype}, {k.dtype} and "
            f"{v.dtype}; use impl='torch'"
        )
    if q.shape[-1] > WIDEST_HEAD or v.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"impl='triton' takes heads up to {WIDEST_HEAD} wide and values as wide as keys, not keys of {k.shape[-1]} "
            f"and values of {v.shape[-1]}; use impl='torch'"
        )
    if mask.pairs is not None:
        raise ValueError("impl='triton' takes no mask with pairs; use impl='torch'")
    if triton.knobs.runtime.interpret and q.dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter takes bfloat16 for integers in products: use float32, or impl='torch'")
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if needs_grad and not mask.parallel:
        raise ValueError(
            "impl='triton' has no gradients with positions: use impl='torch', or torch.no_grad() where none are needed"
        )


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """Arguments: q, k, v, content_bias, table, table_bias, Options."""
        *inputs, plan = arguments
        operands = Operands.of(tuple(inputs), plan)
        saved = Saved.empty(operands)
        for launch in saved.launches(operands):
            launch()
        ctx.plan = plan
        ctx.save_for_backward(*inputs, operands.key_bias_BNS, saved.out_BTNH, saved.log_sums_BNT, saved.far_BNT)
        return saved.out_BTNH.transpose(1, 2)

    @staticmethod
    @first_order("relative attention by Triton")
    def backward(ctx: Any, out_grad_BNTH: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, key_bias_BNS, out_BTNH, log_sums_BNT, far_BNT = ctx.saved_tensors
        saved = Saved(out_BTNH=out_BTNH, log_sums_BNT=log_sums_BNT, far_BNT=far_BNT)
        operands = dataclasses.replace(Operands.of(tuple(inputs), ctx.plan), key_bias_BNS=key_bias_BNS)
        gradients = Gradients(operands, saved, out_grad_BNTH.transpose(1, 2).contiguous())
        for launch in gradients.launches():
            launch()
        found = gradients.finish()
        return (*(g if g is None else g.to(x.dtype) for g, x in zip(found, inputs, strict=True)), None)


def aot_cases() -> list[Launch]:
    """Every launch of a training step and of streaming, on meta tensors: what the ahead-of-time test compiles."""
    cases: list[Launch] = []
    for gpu in ARCHITECTURES:
        for dtype, head_dim in ((torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 64)):
            for with_table in (True, False):
                cases += _training_case(dtype, head_dim, with_table, gpu)
            cases += _streaming_case(dtype, head_dim, gpu)
        cases += _training_case(torch.bfloat16, 64, True, gpu, mask=_meta_mask("full"))
        cases += _training_case(torch.bfloat16, 128, False, gpu, mask=_meta_mask("full"))
        cases += _training_case(torch.bfloat16, 128, True, gpu, mask=_meta_mask("prefix"))
        for dtype, head_dim, with_table, kind in _WIDE + ([] if gpu == "sm_90" else [_SPILLS]):
            cases += _training_case(dtype, head_dim, with_table, gpu, mask=_meta_mask(kind))
        # Triton compiles an argument of 1 in as a constant: one token and one row must compile too.
        cases += _training_case(torch.bfloat16, 16, True, gpu, tokens=1, rows=1)
    return cases


_WIDE = [
    (torch.float32, 64, True, "full"),
    (torch.float32, 64, False, "prefix"),
    (torch.float32, 128, False, "full"),
    (torch.float32, 256, False, "full"),
    (torch.bfloat16, 256, True, "full"),
    (torch.bfloat16, 256, False, "prefix"),
]
_SPILLS = (torch.float32, 128, True, "prefix")
"""On sm_90 by a few bytes (see `tilings`)."""


def _training_case(
    dtype: torch.dtype,
    head_dim: int,
    with_table: bool,
    gpu: str,
    tokens: int = 1000,
    rows: int = 300,
    mask: Mask | None = None,
) -> Iterator[Launch]:
    """Without a mask, with a table the causal one that takes most registers: packed rows, window and sinks. Without a
    table, causality alone."""
    if mask is None and with_table:
        starts_BT = torch.empty(2, tokens, dtype=torch.int64, device="meta")
        mask = Mask(starts_BT=starts_BT, window=128, sinks=4)
    mask = mask or Mask()
    inputs = _meta_inputs(dtype, head_dim, tokens, rows if with_table else None)
    future_rows = 100 if with_table and mask.ahead else 0
    operands = Operands.of(inputs, Options(mask=mask, scale=0.125, block=None, future_rows=future_rows), gpu)
    saved = Saved.empty(operands)
    yield from saved.launches(operands)
    yield from Gradients(operands, saved, saved.out_BTNH).launches()


def _streaming_case(dtype: torch.dtype, head_dim: int, gpu: str) -> Iterator[Launch]:
    queries = torch.empty(2, 1000, dtype=torch.int64, device="meta")
    keys = torch.empty(2, 2, 1000, dtype=torch.int64, device="meta")
    mask = Mask(query_positions_BT=queries, key_positions_BKS=keys, window=128, sinks=4)
    operands = Operands.of(_meta_inputs(dtype, head_dim, 1000, 300), Options(mask=mask, scale=0.125, block=None), gpu)
    yield from streaming_launches(operands, torch.empty_like(operands.q_BTNH))


def _meta_mask(kind: str) -> Mask:
    """With padding."""
    keys_BS = torch.empty(2, 1000, dtype=torch.bool, device="meta")
    if kind == "full":
        return Mask.full(keys_BS)
    prefix_B = torch.empty(2, dtype=torch.int64, device="meta")
    return Mask(prefix_B=prefix_B, keys_BS=keys_BS, window=128, sinks=4)


def _meta_inputs(dtype: torch.dtype, head_dim: int, tokens: int, rows: int | None) -> tuple[Tensor | None, ...]:
    def meta(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    token_major = (meta(2, tokens, heads, head_dim).transpose(1, 2) for heads in (8, 2, 2))
    if rows is None:
        return (*token_major, None, None, None)
    return (*token_major, meta(8, head_dim), meta(8, rows, head_dim), meta(8, rows))
