"""The sum of the definition, token by token and tap by tap: defines the result."""

import torch
from torch import Tensor


def depthwise_conv_qkv_reference(
    qkv: tuple[Tensor, Tensor, Tensor],
    kernels: tuple[Tensor, Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None, Tensor | None],
    tails: tuple[Tensor | None, Tensor | None, Tensor | None],
    starts_BT: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (
        depthwise_conv_reference(x, kernel, bias, tail, starts_BT)
        for x, kernel, bias, tail in zip(qkv, kernels, biases, tails, strict=True)
    )
    return q, k, v


def depthwise_conv_reference(
    x_BTNH: Tensor, kernel_NHW: Tensor, bias_NH: Tensor | None, tail_BWNH: Tensor | None, starts_BT: Tensor | None
) -> Tensor:
    width = kernel_NHW.shape[-1]

    def row(t: int, source: int) -> Tensor:
        """The input row that the output at t reads at index `source`: zeros before the start of its document."""
        if source >= 0:
            if starts_BT is None:
                return x_BTNH[:, source]
            seen_B11 = (source >= starts_BT[:, t])[:, None, None]
            return torch.where(seen_B11, x_BTNH[:, source], 0.0)
        if tail_BWNH is None:
            return torch.zeros_like(x_BTNH[:, 0])
        return tail_BWNH[:, width - 1 + source]

    outputs = []
    for t in range(x_BTNH.shape[1]):
        y = torch.zeros_like(x_BTNH[:, 0])
        for w in range(width):
            y = y + kernel_NHW[..., w] * row(t, t - (width - 1) + w)
        outputs.append(y if bias_NH is None else y + bias_NH)
    return torch.stack(outputs, dim=1) if outputs else x_BTNH
