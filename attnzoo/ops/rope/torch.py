"""All pairs at once; angles in at least float32, because they grow with the position."""

from collections.abc import Sequence

import torch
from torch import Tensor

from attnzoo.ops.common.recent import recent
from attnzoo.ops.rope.scaling import RopeScaling, frequencies
from attnzoo.types import accumulation_dtype


def rope_torch(
    xs_BTNH: Sequence[Tensor], positions_BT: Tensor, theta: float, scaling: RopeScaling | None
) -> tuple[Tensor, ...]:
    half = xs_BTNH[0].shape[-1] // 2
    sin, cos = _waves(positions_BT, half, theta, scaling, accumulation_dtype(xs_BTNH[0].dtype))
    return tuple(_turn(x, sin, cos) for x in xs_BTNH)


@recent
def _waves(
    positions_BT: Tensor, half: int, theta: float, scaling: RopeScaling | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """sin_BT1H and cos_BT1H of `half` angles per position, for both channels of a pair; the first's sine is negated."""
    positions_BT1 = positions_BT.to(dtype)[..., None]
    angles_BT1H = (positions_BT1 * frequencies(half, theta, scaling, like=positions_BT1))[:, :, None]
    sin, cos = angles_BT1H.sin(), angles_BT1H.cos()
    return torch.cat([-sin, sin], dim=-1), torch.cat([cos, cos], dim=-1)


def _turn(x_BTNH: Tensor, sin_BT1H: Tensor, cos_BT1H: Tensor) -> Tensor:
    others_BTNH = x_BTNH.roll(x_BTNH.shape[-1] // 2, dims=-1)  # at every channel the other one of its pair
    return torch.addcmul(x_BTNH * cos_BT1H, others_BTNH, sin_BT1H).to(x_BTNH.dtype)
