"""All pairs at once; angles in at least float32, because they grow with the position."""

import torch
from torch import Tensor

from attnzoo.types import accumulation_dtype


def rope_torch(x_BTNH: Tensor, positions_BT: Tensor, theta: float) -> Tensor:
    half = x_BTNH.shape[-1] // 2
    dtype = accumulation_dtype(x_BTNH.dtype)
    frequencies = theta ** (-torch.arange(half, dtype=dtype, device=x_BTNH.device) / half)
    angles_BT1H = (positions_BT.to(dtype)[..., None] * frequencies)[:, :, None]
    sin, cos = angles_BT1H.sin(), angles_BT1H.cos()
    real, imaginary = x_BTNH.to(dtype).split(half, dim=-1)
    turned = torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    return turned.to(x_BTNH.dtype)
