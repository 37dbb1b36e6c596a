"""The sum of the definition, token by token and tap by tap: what is right."""

import torch
from torch import Tensor


def depthwise_conv_reference(
    x_BTNH: Tensor, kernel_NHW: Tensor, bias_NH: Tensor | None, tail_BWNH: Tensor | None
) -> Tensor:
    width = kernel_NHW.shape[-1]

    def row(t: int) -> Tensor:
        if t >= 0:
            return x_BTNH[:, t]
        if tail_BWNH is None:
            return torch.zeros_like(x_BTNH[:, 0])
        return tail_BWNH[:, width - 1 + t]

    outputs = []
    for t in range(x_BTNH.shape[1]):
        y = torch.zeros_like(x_BTNH[:, 0])
        for w in range(width):
            y = y + kernel_NHW[..., w] * row(t - (width - 1) + w)
        outputs.append(y if bias_NH is None else y + bias_NH)
    return torch.stack(outputs, dim=1)
