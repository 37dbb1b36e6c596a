"""Every pair as a complex number, turned on its own: what is right."""

import torch
from torch import Tensor


def rope_reference(x_BTNH: Tensor, positions_BT: Tensor, theta: float) -> Tensor:
    half = x_BTNH.shape[-1] // 2
    channels: list[Tensor] = [torch.empty(0)] * (2 * half)
    for c in range(half):
        angle_BT1 = positions_BT.to(x_BTNH.dtype)[..., None] * theta ** (-c / half)
        real, imaginary = x_BTNH[..., c], x_BTNH[..., c + half]
        channels[c] = real * angle_BT1.cos() - imaginary * angle_BT1.sin()
        channels[c + half] = real * angle_BT1.sin() + imaginary * angle_BT1.cos()
    return torch.stack(channels, dim=-1)
