"""All pairs at once; angles in at least float32, because they grow with the position."""

from collections.abc import Sequence

import torch
from torch import Tensor

from attnzoo.ops.rope.scaling import RopeScaling, frequencies
from attnzoo.types import accumulation_dtype

Waves = tuple[Tensor, Tensor]
"""sin_BT1H and cos_BT1H, for both channels of a pair; the first's sine is negated."""


def rope_torch(
    xs_BTNH: Sequence[Tensor], positions_BT: Tensor, theta: float, scaling: RopeScaling | None
) -> tuple[Tensor, ...]:
    waves = rope_waves(positions_BT, xs_BTNH[0].shape[-1], theta, scaling, xs_BTNH[0].dtype)
    return tuple(turned(x, waves) for x in xs_BTNH)


def rope_waves(
    positions_BT: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None, dtype: torch.dtype
) -> Waves:
    """The waves that turn tensors of a dtype at these positions."""
    positions_BT1 = positions_BT.to(accumulation_dtype(dtype))[..., None]
    angles_BT1H = (positions_BT1 * frequencies(head_dim // 2, theta, scaling, like=positions_BT1))[:, :, None]
    sin, cos = angles_BT1H.sin(), angles_BT1H.cos()
    return torch.cat([-sin, sin], dim=-1), torch.cat([cos, cos], dim=-1)


def turned(x_BTNH: Tensor, waves: Waves) -> Tensor:
    """x rotated by waves."""
    sin_BT1H, cos_BT1H = waves
    others_BTNH = x_BTNH.roll(x_BTNH.shape[-1] // 2, dims=-1)  # at every channel the other one of its pair
    return torch.addcmul(x_BTNH * cos_BT1H, others_BTNH, sin_BT1H).to(x_BTNH.dtype)
