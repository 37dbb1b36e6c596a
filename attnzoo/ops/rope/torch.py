"""All pairs at once; angles in at least float32, because they grow with the position."""

from collections.abc import Sequence

import torch
from torch import Tensor

from attnzoo.ops.rope.scaling import RopeScaling, frequencies
from attnzoo.types import accumulation_dtype


def rope_torch(
    xs_BTNH: Sequence[Tensor], positions_BT: Tensor, theta: float, scaling: RopeScaling | None
) -> tuple[Tensor, ...]:
    half = xs_BTNH[0].shape[-1] // 2
    positions_BT1 = positions_BT.to(accumulation_dtype(xs_BTNH[0].dtype))[..., None]
    angles_BT1H = (positions_BT1 * frequencies(half, theta, scaling, like=positions_BT1))[:, :, None]
    sin, cos = angles_BT1H.sin(), angles_BT1H.cos()
    return tuple(_turn(x, sin, cos) for x in xs_BTNH)


def _turn(x_BTNH: Tensor, sin_BT1H: Tensor, cos_BT1H: Tensor) -> Tensor:
    real, imaginary = x_BTNH.to(sin_BT1H.dtype).chunk(2, dim=-1)
    turned = [real * cos_BT1H - imaginary * sin_BT1H, real * sin_BT1H + imaginary * cos_BT1H]
    return torch.cat(turned, dim=-1).to(x_BTNH.dtype)
