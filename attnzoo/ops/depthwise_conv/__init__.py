"""Causal depthwise convolution of q, k and v over time, with the rows before the start of the chunk given.

y_t = sum_w kernel[..., w] x_{t-(W-1)+w} + bias: the last tap weighs the current token
(Primer, So et al. 2021, arXiv 2109.08668, multi-dconv-head attention, applied to each of q, k and v).
"""

from torch import Tensor

from attnzoo.ops.common.impl import Impl, choose, lazily
from attnzoo.ops.depthwise_conv.reference import depthwise_conv_qkv_reference
from attnzoo.ops.depthwise_conv.torch import depthwise_conv_qkv_torch

QKV = tuple[Tensor, Tensor, Tensor]
OptionalQKV = tuple[Tensor | None, Tensor | None, Tensor | None]

NONE: OptionalQKV = (None, None, None)


def depthwise_conv_qkv(
    qkv: QKV,
    kernels: QKV,
    *,
    biases: OptionalQKV = NONE,
    tails: OptionalQKV | None = None,
    starts_BT: Tensor | None = None,
    impl: Impl = "auto",
) -> QKV:
    """Returns (q_BTNH, k_BTKH, v_BTKH) convolved; k and v may be those of a context, of another length than q.

    Each kernel is [N or 1, H, W] (K for k and v; 1: shared by the heads), each bias likewise without W. `tails`
    holds the W-1 rows of q, k and v before this chunk, oldest first; None means zeros, the start of a sequence.
    `starts_BT` (int64, parallel form) is the index of the first token each token may see, the start of its document
    in a packed row (see Mask): a tap that would read before it reads zero.
    Raises ValueError when shapes do not fit, for tails together with starts, or when `impl` is unknown.
    """
    if tails is not None and starts_BT is not None:
        raise ValueError("starts_BT belongs to the parallel form and tails to the streaming one: give one of them")
    carried = NONE if tails is None else tails
    for name, x, kernel, bias, tail in zip("qkv", qkv, kernels, biases, carried, strict=True):
        _check(name, x, kernel, bias, tail)
    if len({kernel.shape[-1] for kernel in kernels}) > 1:
        raise ValueError(f"kernels of widths {[kernel.shape[-1] for kernel in kernels]}; q, k and v share one width")
    if qkv[0].shape[0] != qkv[1].shape[0] or qkv[1].shape != qkv[2].shape:
        raise ValueError(f"q, k and v {[tuple(x.shape) for x in qkv]} must be [B,T,N,H], [B,S,K,H] and [B,S,K,H]")
    if starts_BT is not None and not starts_BT.shape == qkv[0].shape[:2] == qkv[1].shape[:2]:
        raise ValueError(
            f"starts_BT has shape {tuple(starts_BT.shape)}; it must be {tuple(qkv[0].shape[:2])}, as q, and k "
            f"{tuple(qkv[1].shape[:2])}"
        )
    known = {
        "reference": depthwise_conv_qkv_reference,
        "torch": depthwise_conv_qkv_torch,
        "triton": lazily("attnzoo.ops.depthwise_conv.triton", "depthwise_conv_qkv_triton"),
    }
    out: QKV = choose("depthwise_conv", impl, known, qkv[0])(qkv, kernels, biases, carried, starts_BT)
    return out


def _check(name: str, x: Tensor, kernel: Tensor, bias: Tensor | None, tail: Tensor | None) -> None:
    """Raises ValueError when kernel, bias or tail do not fit x."""
    if x.dim() != 4 or kernel.dim() != 3:
        raise ValueError(
            f"{name} {tuple(x.shape)} must be [batch, time, heads, head_dim] and its kernel [.., .., width]"
        )
    batch, _, heads, head_dim = x.shape
    width = kernel.shape[-1]
    if kernel.shape[0] not in (1, heads) or kernel.shape[1] != head_dim:
        raise ValueError(
            f"kernel {tuple(kernel.shape)} does not fit {name} {tuple(x.shape)}: "
            f"it must be [{heads} or 1, {head_dim}, width]"
        )
    if bias is not None and bias.shape != kernel.shape[:2]:
        raise ValueError(
            f"bias {tuple(bias.shape)} of {name} must be {tuple(kernel.shape[:2])}, its kernel without width"
        )
    if tail is not None and tail.shape[1] != width - 1:
        raise ValueError(f"tail holds {tail.shape[1]} rows; a kernel of width {width} needs {width - 1}")
    if tail is not None and tail.shape != (batch, width - 1, heads, head_dim):
        raise ValueError(f"tail {tuple(tail.shape)} of {name} must be {(batch, width - 1, heads, head_dim)}")


__all__ = ["depthwise_conv_qkv"]
