"""All pairs at once; angles in at least float32, because they grow with the position."""

import torch
from torch import Tensor

from attnzoo.ops.rope.scaling import RopeScaling, frequencies
from attnzoo.types import accumulation_dtype


def rope_torch(x_BTNH: Tensor, positions_BT: Tensor, theta: float, scaling: RopeScaling | None) -> Tensor:
    half = x_BTNH.shape[-1] // 2
    dtype = accumulation_dtype(x_BTNH.dtype)
    positions_BT1 = positions_BT.to(dtype)[..., None]
    angles_BT1H = (positions_BT1 * frequencies(half, theta, scaling, like=positions_BT1))[:, :, None]
    sin, cos = angles_BT1H.sin(), angles_BT1H.cos()
    real, imaginary = x_BTNH.to(dtype).split(half, dim=-1)
    turned = torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    return turned.to(x_BTNH.dtype)
