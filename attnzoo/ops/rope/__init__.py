"""Rotary position embedding, halves not interleaved (Su et al. 2021, arXiv 2104.09864; the Llama layout)."""

from torch import Tensor

from attnzoo.ops.common.impl import Impl, choose
from attnzoo.ops.rope.reference import rope_reference
from attnzoo.ops.rope.scaling import RopeScaling
from attnzoo.ops.rope.torch import rope_torch, rope_waves, turned


def rope(
    *xs_BTNH: Tensor,
    positions_BT: Tensor,
    theta: float = 10000.0,
    scaling: RopeScaling | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, ...]:
    """Rotates channel pair (c, c + H/2) of every x_BTNH by positions_BT * theta^(-2c/H), frequencies changed by
    `scaling`; tensors given together share their angles.

    Returns tensors of the same shapes and dtypes. Raises ValueError when H is odd or differs, or `impl` is unknown.
    """
    head_dim = xs_BTNH[0].shape[-1]
    if head_dim % 2 or any(x.shape[-1] != head_dim for x in xs_BTNH):
        sizes = ", ".join(str(x.shape[-1]) for x in xs_BTNH)
        raise ValueError(f"head_dim={sizes} must be even and the same: rotary positions turn pairs of channels")
    known = {"reference": rope_reference, "torch": rope_torch}
    out: tuple[Tensor, ...] = choose("rope", impl, known, xs_BTNH[0])(xs_BTNH, positions_BT, theta, scaling)
    return out


__all__ = ["RopeScaling", "rope", "rope_waves", "turned"]
