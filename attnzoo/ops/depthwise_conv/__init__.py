"""Causal depthwise convolution over time, with the rows before the start of the chunk given.

y_t = sum_w kernel[..., w] x_{t-(W-1)+w} + bias: the last tap weighs the current token
(Primer, So et al. 2021, arXiv 2109.08668, multi-dconv-head attention).
"""

from torch import Tensor

from attnzoo.ops.depthwise_conv.reference import depthwise_conv_reference
from attnzoo.ops.depthwise_conv.torch import depthwise_conv_torch
from attnzoo.ops.impl import Impl, choose


def depthwise_conv(
    x_BTNH: Tensor,
    kernel_NHW: Tensor,
    *,
    bias_NH: Tensor | None = None,
    tail_BWNH: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Returns y_BTNH.

    kernel: [N or 1, H, W] (1: one kernel shared by the heads), bias likewise without W. `tail_BWNH` holds the
    W-1 rows of x before this chunk, oldest first; None means zeros, the start of a sequence.
    Raises ValueError when shapes do not fit or `impl` is unknown.
    """
    heads, head_dim = x_BTNH.shape[2:]
    width = kernel_NHW.shape[-1]
    if kernel_NHW.shape[0] not in (1, heads) or kernel_NHW.shape[1] != head_dim:
        raise ValueError(
            f"kernel {tuple(kernel_NHW.shape)} does not fit x {tuple(x_BTNH.shape)}: "
            f"it must be [{heads} or 1, {head_dim}, width]"
        )
    if tail_BWNH is not None and tail_BWNH.shape[1] != width - 1:
        raise ValueError(f"tail holds {tail_BWNH.shape[1]} rows; a kernel of width {width} needs {width - 1}")
    known = {"reference": depthwise_conv_reference, "torch": depthwise_conv_torch}
    out: Tensor = choose("depthwise_conv", impl, known)(x_BTNH, kernel_NHW, bias_NH, tail_BWNH)
    return out


__all__ = ["depthwise_conv"]
