"""Rotary position embedding, halves not interleaved (Su et al. 2021, arXiv 2104.09864; the Llama layout)."""

from torch import Tensor

from attnzoo.ops.impl import Impl, choose
from attnzoo.ops.rope.reference import rope_reference
from attnzoo.ops.rope.scaling import RopeScaling
from attnzoo.ops.rope.torch import rope_torch


def rope(
    x_BTNH: Tensor,
    positions_BT: Tensor,
    *,
    theta: float = 10000.0,
    scaling: RopeScaling | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Rotates channel pair (c, c + H/2) of x_BTNH by positions_BT * theta^(-2c/H), frequencies stretched by `scaling`.

    Returns x's shape and dtype. Raises ValueError when H is odd or `impl` is unknown.
    """
    if x_BTNH.shape[-1] % 2:
        raise ValueError(f"head_dim={x_BTNH.shape[-1]} is odd; rotary positions turn pairs of channels")
    known = {"reference": rope_reference, "torch": rope_torch}
    out: Tensor = choose("rope", impl, known, x_BTNH)(x_BTNH, positions_BT, theta, scaling)
    return out


__all__ = ["RopeScaling", "rope"]
