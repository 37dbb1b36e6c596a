"""One launch for q, k and v forward, one for all their gradients.

Every program writes a partial sum of the kernel's and bias's gradients, which torch adds up: without atomics, so that
two runs agree bit for bit. torch computes the gradient of the few rows of a tail.
"""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from attnzoo.ops.common.first_order import first_order
from attnzoo.ops.depthwise_conv.kernels import ConvRows, backward_kernel, forward_kernel
from attnzoo.ops.depthwise_conv.torch import add_tail_gradients

OPTIONS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
TILE = 2048
"""Elements of a program's tile: 16 per thread of 128 threads, for the sum and for the current tap."""


def depthwise_conv_qkv_triton(
    qkv: tuple[Tensor, Tensor, Tensor],
    kernels: tuple[Tensor, Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None, Tensor | None],
    tails: tuple[Tensor | None, Tensor | None, Tensor | None],
    starts_BT: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if any(x.dtype == torch.float64 for x in (*qkv, *kernels)):
        raise ValueError("depthwise_conv with impl='triton' sums in float32; use impl='torch' for float64")
    lengths = [x.shape[1] for x in qkv]
    if lengths[0] != lengths[1]:  # a context: one launch has one length, and rows after a sequence change none in it
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, max(lengths) - x.shape[1])) for x in qkv)
        q, k, v = depthwise_conv_qkv_triton((q, k, v), kernels, biases, tails, None)
        return q[:, : lengths[0]], k[:, : lengths[1]], v[:, : lengths[1]]
    out: tuple[Tensor, Tensor, Tensor] = _TritonDepthwiseConv.apply(starts_BT, *qkv, *kernels, *biases, *tails)
    return out


class _TritonDepthwiseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, starts_BT: Tensor | None, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """`tensors`: three each of rows, kernels, biases and tails."""
        tensors = tuple(None if x is None else _dense(x) for x in tensors)
        ctx.save_for_backward(starts_BT, *tensors[:6], *tensors[9:])
        parts, outputs = [], []
        for x, kernel, bias, tail in zip(*(tensors[i : i + 3] for i in (0, 3, 6, 9)), strict=True):
            assert x is not None
            assert kernel is not None
            y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, kernel.dtype), device=x.device)
            outputs.append(y)
            parts.append(_rows(x, y, kernel, bias, tail))
        _launch(forward_kernel, parts, starts_BT)
        return tuple(outputs)

    @staticmethod
    @first_order("the depthwise convolution")
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        starts_BT, *tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        xs, kernels, tails = tensors[:3], tensors[3:6], tensors[6:]
        dense = [_dense(dy) for dy in dys]
        tiles = _grid(xs[0])[0] * xs[0].shape[0]
        heads, head_dim = sum(x.shape[2] for x in xs), xs[0].shape[3]
        width = kernels[0].shape[-1]
        partials = torch.empty(tiles, heads, width + 1, head_dim, dtype=torch.float32, device=xs[0].device)
        dxs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in xs]
        parts = [_rows(*part) for part in zip(xs, dxs, kernels, [partials] * 3, dense, strict=True)]
        _launch(backward_kernel, parts, starts_BT)
        sums = partials.sum(0).split([x.shape[2] for x in xs])
        dkernels, dbiases, dtails = [], [], []
        for i, (kernel, tail) in enumerate(zip(kernels, tails, strict=True)):
            dtaps_WNH = sums[i][:, :width].movedim(1, 0).flip(0).contiguous()
            taps_WNH = kernel.movedim(-1, 0).flip(0)
            dtails.append(None if tail is None else add_tail_gradients(dtaps_WNH, dense[i], tail, taps_WNH))
            dkernels.append(dtaps_WNH.flip(0).movedim(0, -1).sum_to_size(kernel.shape).to(kernel.dtype))
            dbiases.append(sums[i][:, width].sum_to_size(kernel.shape[:2]) if needed[6 + i] else None)
        return None, *dxs, *dkernels, *dbiases, *dtails


def _dense(x: Tensor) -> Tensor:
    """x with a dense last axis, which the kernels need; the other axes may have any strides."""
    return x if x.stride(-1) == 1 and x.dim() == 4 else x.contiguous()


def _rows(x: Tensor, y: Tensor, kernel: Tensor, bias: Tensor | None, other: Tensor | None) -> ConvRows:
    strides = (0, 0, 0) if other is None else other.stride()[:3]
    shared = kernel.shape[0] == 1 and x.shape[2] > 1
    by_head = 0 if shared else kernel.stride(0)
    return ConvRows._make((x, y, kernel, bias, other, *x.stride()[:3], *strides, by_head, x.shape[2]))


def _blocks(tokens: int, head_dim: int) -> tuple[int, int]:
    wide = triton.next_power_of_2(head_dim)
    return min(max(TILE // wide, 1), triton.next_power_of_2(tokens)), wide


def _grid(x_BTNH: Tensor) -> tuple[int, tuple[int, int]]:
    """(number of tiles of a sequence, the sides of a tile)."""
    block = _blocks(x_BTNH.shape[1], x_BTNH.shape[3])
    return triton.cdiv(x_BTNH.shape[1], block[0]), block


def _launch(kernel: Any, parts: list[ConvRows], starts_BT: Tensor | None) -> None:
    x = parts[0].x
    tiles, block = _grid(x)
    starts = None if starts_BT is None else starts_BT.contiguous()
    grid = (tiles * x.shape[0], sum(part.heads for part in parts))
    kernel[grid](*parts, starts, x.shape[1], parts[0].kernel.shape[-1], x.shape[3], block, **OPTIONS)


def aot_cases() -> list[SimpleNamespace]:
    """Both launches with all options; the ahead-of-time test compiles them."""
    cases = []
    for dtype, head_dim in (("bf16", 64), ("bf16", 128), ("fp16", 64), ("fp32", 64)):
        for kernel, sums in ((forward_kernel, f"*{dtype}"), (backward_kernel, "*fp32")):
            rows = ConvRows._make([f"*{dtype}"] * 3 + [sums, f"*{dtype}"] + ["i32"] * 8)
            signature: dict[str, Any] = {"q": rows, "k": rows, "v": rows, "starts": "*i64", "tokens": "i32"}
            case = SimpleNamespace(
                name=f"conv_{kernel.__name__.removesuffix('_kernel')}-{dtype}-{head_dim}",
                kernel=kernel,
                signature=signature | dict.fromkeys(("width", "head_dim", "block"), "constexpr"),
                constexprs={"width": 3, "head_dim": head_dim, "block": _blocks(4096, head_dim)},
                options=OPTIONS,
            )
            cases.append(case)
    return cases
