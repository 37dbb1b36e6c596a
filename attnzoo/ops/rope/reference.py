"""Rotates every pair of channels as a complex number, one by one: defines the result."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attnzoo.ops.rope.scaling import RopeScaling


def rope_reference(
    xs_BTNH: Sequence[Tensor], positions_BT: Tensor, theta: float, scaling: RopeScaling | None
) -> tuple[Tensor, ...]:
    return tuple(_turned(x, positions_BT, theta, scaling) for x in xs_BTNH)


def _turned(x_BTNH: Tensor, positions_BT: Tensor, theta: float, scaling: RopeScaling | None) -> Tensor:
    half = x_BTNH.shape[-1] // 2
    channels: list[Tensor] = [torch.empty(0)] * (2 * half)
    for c in range(half):
        angle_BT1 = positions_BT.to(x_BTNH.dtype)[..., None] * _stretched(theta ** (-c / half), scaling)
        real, imaginary = x_BTNH[..., c], x_BTNH[..., c + half]
        channels[c] = real * angle_BT1.cos() - imaginary * angle_BT1.sin()
        channels[c + half] = real * angle_BT1.sin() + imaginary * angle_BT1.cos()
    return torch.stack(channels, dim=-1)


def _stretched(frequency: float, scaling: RopeScaling | None) -> float:
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    wavelength = 2 * math.pi / frequency
    longest = scaling.original_max_positions / scaling.low_freq_factor
    shortest = scaling.original_max_positions / scaling.high_freq_factor
    if wavelength > longest:
        return frequency / scaling.factor
    if wavelength < shortest:
        return frequency
    turns = scaling.original_max_positions / wavelength
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - kept) * frequency / scaling.factor + kept * frequency
