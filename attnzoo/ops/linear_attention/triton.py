"""Launches of the kernels. Only the inputs are kept between forward and backward.

Memories of all chunks exist while a forward or a backward runs, and the backward recomputes them. Every result is
written by one program, so that two runs agree bit for bit. One token without gradients takes the decode kernel.
"""

from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor

from attnzoo.ops.common.first_order import first_order
from attnzoo.ops.common.strided import StridedRows, strided_rows
from attnzoo.ops.linear_attention.kernels import (
    ChunkTile,
    Time,
    decode_kernel,
    key_gradients_kernel,
    memories_kernel,
    memory_gradients_kernel,
    outputs_kernel,
    query_gradients_kernel,
    value_gradients_kernel,
)

STAGES = 2
LEAST_LOG2 = -1000.0
"""log2 of a decay of 0: any power of it is 0, and its 0th power is 1."""


def linear_attention_triton(
    q_BNTH: Tensor,
    k_BKTH: Tensor,
    v_BKTH: Tensor,
    decay_K: Tensor | None,
    memory_BKHH: Tensor | None,
    counts_B: Tensor | None,
    starts_BT: Tensor | None,
    normalise: bool,
) -> tuple[Tensor, Tensor]:
    if torch.float64 in (q_BNTH.dtype, k_BKTH.dtype, v_BKTH.dtype):
        raise ValueError("linear_attention with impl='triton' sums in float32; use impl='torch' for float64")
    qkv = tuple(_dense(x) for x in (q_BNTH, k_BKTH, v_BKTH))
    given = (*qkv, decay_K, memory_BKHH)
    needed = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    if q_BNTH.shape[2] == 1 and memory_BKHH is not None and not needed:
        return _decode(qkv, decay_K, memory_BKHH, counts_B, normalise)
    out: tuple[Tensor, Tensor] = _TritonLinearAttention.apply(*given, counts_B, starts_BT, normalise)
    return out


class _TritonLinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BNTH: Tensor,
        k_BKTH: Tensor,
        v_BKTH: Tensor,
        decay_K: Tensor | None,
        memory_BKHH: Tensor | None,
        counts_B: Tensor | None,
        starts_BT: Tensor | None,
        normalise: bool,
    ) -> tuple[Tensor, Tensor]:
        qkv = (q_BNTH, k_BKTH, v_BKTH)
        tile, time = _tile(qkv, normalise), _time(decay_K, starts_BT, counts_B, q_BNTH.shape[2])
        memories, after = _memories(qkv, memory_BKHH, time, tile)
        o_BNTH = _new(q_BNTH, v_BKTH.shape[-1])
        totals = torch.empty(q_BNTH.shape[:3], device=q_BNTH.device) if normalise else None
        grid = (memories.shape[1], q_BNTH.shape[0] * q_BNTH.shape[1], triton.cdiv(tile.value_dim, tile.value_block))
        _run(outputs_kernel, grid, tile, *map(strided_rows, qkv), strided_rows(o_BNTH), totals, memories, time)
        saved = o_BNTH if normalise else None
        ctx.save_for_backward(*qkv, decay_K, memory_BKHH, counts_B, starts_BT, saved, totals)
        ctx.normalise = normalise
        return o_BNTH, after

    @staticmethod
    @first_order("linear attention")
    def backward(ctx: Any, do_BNTH: Tensor, dafter: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, decay_K, memory_BKHH, counts_B, starts_BT, o_BNTH, totals = ctx.saved_tensors
        tile, time = _tile((q, k, v), ctx.normalise), _time(decay_K, starts_BT, counts_B, q.shape[2])
        memories, _ = _memories((q, k, v), memory_BKHH, time, tile)
        chunks = memories.shape[1]
        do, dtotals = _dense(do_BNTH), None
        if o_BNTH is not None:
            dtotals = -(do.float() * o_BNTH.float()).sum(-1) / totals
        dmemories, dbefore = torch.empty_like(memories), torch.empty_like(dafter, memory_format=torch.contiguous_format)
        kept = (strided_rows(do), totals, dtotals)
        narrow = _narrow(tile)
        walk = _memory_grid(memories, narrow)
        _run(
            memory_gradients_kernel, walk, narrow, strided_rows(q), *kept, dafter.contiguous(), dmemories, dbefore, time
        )
        dq, dk, dv = _new(q, q.shape[-1]), _new(k, k.shape[-1]), _new(v, v.shape[-1])
        qkv = tuple(strided_rows(x) for x in (q, k, v))
        shares: tuple[Tensor | None, Tensor | None] = (None, None)
        if ctx.needs_input_grad[3]:
            shares = (memories.new_empty(*q.shape[:2], chunks), memories.new_empty(*k.shape[:2], chunks))
        by_query, by_key = (chunks, q.shape[0] * q.shape[1]), (chunks, k.shape[0] * k.shape[1])
        _run(query_gradients_kernel, by_query, tile, qkv, *kept, memories, strided_rows(dq), shares[0], time)
        _run(key_gradients_kernel, by_key, tile, qkv, *kept, (memories, dmemories), strided_rows(dk), shares[1], time)
        split = _split(tile)
        by_value = (*by_key, triton.cdiv(split.value_dim, split.value_block))
        _run(value_gradients_kernel, by_value, split, qkv, *kept, dmemories, strided_rows(dv), time)
        ddecay = None
        if shares[0] is not None and shares[1] is not None:
            ddecay = shares[0].sum((0, 2)).view(k.shape[1], -1).sum(1) + shares[1].sum((0, 2))
        return dq, dk, dv, ddecay, None if memory_BKHH is None else dbefore, None, None, None


def _decode(
    qkv: tuple[Tensor, ...], decay_K: Tensor | None, memory_BKHH: Tensor, counts_B: Tensor | None, normalise: bool
) -> tuple[Tensor, Tensor]:
    q, k, v = qkv
    tile, time = _tile(qkv, normalise), _time(decay_K, None, counts_B, 1)
    before = memory_BKHH.float().contiguous()
    o_BNTH, after = _new(q, v.shape[-1]), torch.empty_like(before)
    grid = (k.shape[0] * k.shape[1], triton.cdiv(tile.value_dim, tile.value_block))
    _run(decode_kernel, grid, tile, tuple(strided_rows(x) for x in qkv), before, after, strided_rows(o_BNTH), time)
    return o_BNTH, after


def _memories(
    qkv: tuple[Tensor, ...], memory_BKHH: Tensor | None, time: Time, tile: ChunkTile
) -> tuple[Tensor, Tensor]:
    """(the memory at the start of each chunk, the memory after the last)."""
    _, k, v = qkv
    batch, kv_heads, tokens, head_dim = k.shape
    chunks = triton.cdiv(tokens, tile.chunk)
    memories = torch.empty(batch * kv_heads, chunks, head_dim, tile.columns, dtype=torch.float32, device=k.device)
    width = tile.value_dim + int(tile.normalise)
    after = torch.empty(batch, kv_heads, head_dim, width, dtype=torch.float32, device=k.device)
    before = None if memory_BKHH is None else memory_BKHH.float().contiguous()
    narrow = _narrow(tile)
    _run(
        memories_kernel,
        _memory_grid(memories, narrow),
        narrow,
        strided_rows(k),
        strided_rows(v),
        before,
        memories,
        after,
        time,
    )
    return memories, after


def _memory_grid(memories: Tensor, narrow: ChunkTile) -> tuple[int, int, int]:
    columns = triton.cdiv(narrow.value_dim + int(narrow.normalise), narrow.value_block)
    return len(memories), columns, triton.cdiv(narrow.head_dim, narrow.key_block)


def _run(kernel: Any, grid: tuple[int, ...], tile: ChunkTile, *arguments: Any) -> None:
    options = {"num_warps": _warps(kernel, tile), "num_stages": STAGES, "enable_fp_fusion": True}
    kernel[grid](*arguments, tile, **options)


def _dense(x: Tensor) -> Tensor:
    """x with a dense last axis; the other axes may have any strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _new(like_BNTH: Tensor, width: int) -> Tensor:
    """An empty [B, N, T, width], in memory as [B, T, N, width], which the output projection reads without a copy."""
    batch, heads, tokens, _ = like_BNTH.shape
    return like_BNTH.new_empty(batch, tokens, heads, width).transpose(1, 2)


def _time(decay_K: Tensor | None, starts_BT: Tensor | None, counts_B: Tensor | None, tokens: int) -> Time:
    log2 = None if decay_K is None else decay_K.detach().float().log2().clamp(min=LEAST_LOG2)
    return Time(log2, None if starts_BT is None else starts_BT.contiguous(), counts_B, tokens)


def _tile(qkv: tuple[Tensor, ...], normalise: bool) -> ChunkTile:
    q, k, v = qkv
    tokens, head_dim = q.shape[2:]
    heads = (k.shape[1], q.shape[1] // k.shape[1])
    return _sizes(q.dtype, (tokens, head_dim, v.shape[-1]), heads, normalise, torch.version.hip is not None)


def _sizes(
    dtype: torch.dtype, lengths: tuple[int, int, int], heads: tuple[int, int], normalise: bool, amd: bool
) -> ChunkTile:
    """Tiles that fit the registers of sm_80, sm_90 and gfx942: float32 factors take twice the space.

    float32 goes through NVIDIA's tensor cores as three products of tf32, which keep its precision; AMD's take float32.
    """
    tokens, head_dim, value_dim = lengths
    key_block = max(16, triton.next_power_of_2(head_dim))
    chunk = 64 if dtype == torch.bfloat16 else 32 if key_block <= 64 else 16
    precision = "tf32" if dtype == torch.float16 else "ieee" if amd else "tf32x3"
    return ChunkTile(
        chunk=min(chunk, max(16, triton.next_power_of_2(tokens))),
        key_block=key_block,
        value_block=min(32, max(16, triton.next_power_of_2(value_dim))),
        head_dim=head_dim,
        value_dim=value_dim,
        columns=triton.cdiv(value_dim + 1, 16) * 16 if normalise else value_dim,
        kv_heads=heads[0],
        group=heads[1],
        normalise=normalise,
        precision=precision,
        widen=triton.knobs.runtime.interpret,  # its product of bfloat16 multiplies their bits (3.9)
    )


def _narrow(tile: ChunkTile) -> ChunkTile:
    """Smaller tiles and more programs, for the loops over chunks, whose rows and columns are independent."""
    return tile._replace(key_block=min(tile.key_block, 64))


def _split(tile: ChunkTile) -> ChunkTile:
    """Smaller tiles for the gradient of v, whose kernel holds k, q and a memory at once."""
    return tile._replace(value_block=16) if tile.key_block > 64 else tile


def _warps(kernel: Any, tile: ChunkTile) -> int:
    if kernel is memory_gradients_kernel:
        return 8 if tile.precision == "tf32x3" else 4
    if kernel in (memories_kernel, decode_kernel):
        return 4
    return 8 if tile.chunk == 64 or tile.key_block > 64 else 4


def aot_cases() -> list[SimpleNamespace]:
    """All launches of a training step and of decoding; the ahead-of-time test compiles them."""
    cases: list[SimpleNamespace] = []
    for target in ("sm_80", "sm_90", "gfx942"):
        for name, dtype, head_dim in (
            ("bf16", torch.bfloat16, 64),
            ("bf16", torch.bfloat16, 128),
            ("fp16", torch.float16, 64),
            ("fp32", torch.float32, 64),
        ):
            tile = _sizes(dtype, (4096, head_dim, head_dim), (2, 4), True, target == "gfx942")
            for kernel, signature, sizes in _signatures(name, tile):
                options = {"num_warps": _warps(kernel, sizes), "num_stages": STAGES, "enable_fp_fusion": True}
                case = SimpleNamespace(
                    name=f"linear_{kernel.__name__.removesuffix('_kernel')}-{name}-{head_dim}",
                    kernel=kernel,
                    signature=signature | {"time": Time("*fp32", "*i64", "*i64", "i32"), "tile": "constexpr"},
                    constexprs={"tile": sizes},
                    options=options,
                    target=target,
                )
                cases.append(case)
    return cases


def _signatures(name: str, tile: ChunkTile) -> list[tuple[Any, dict[str, Any], ChunkTile]]:
    """(kernel, types of its arguments but the last two, tile)."""
    rows, number = StridedRows(f"*{name}", "i32", "i32", "i32"), "*fp32"
    kept = {"do": rows, "scales": number, "dtotals": number}
    qkv = {"qkv": (rows, rows, rows)}
    walk = {"before": number, "memories": number, "after": number}
    back = {"dafter": number, "dmemories": number, "dbefore": number}
    read = {"q": rows, "k": rows, "v": rows, "o": rows, "totals": number, "memories": number}
    return [
        (memories_kernel, {"k": rows, "v": rows} | walk, _narrow(tile)),
        (outputs_kernel, read, tile),
        (memory_gradients_kernel, {"q": rows} | kept | back, _narrow(tile)),
        (query_gradients_kernel, qkv | kept | {"memories": number, "dq": rows, "slopes": number}, tile),
        (key_gradients_kernel, qkv | kept | {"memories": (number, number), "dk": rows, "slopes": number}, tile),
        (value_gradients_kernel, qkv | kept | {"dmemories": number, "dv": rows}, _split(tile)),
        (decode_kernel, qkv | {"before": number, "after": number, "o": rows}, tile),
    ]
