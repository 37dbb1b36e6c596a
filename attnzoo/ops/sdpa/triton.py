"""The kernels of relative attention without their relative terms."""

from torch import Tensor

from attnzoo.ops.common.masks import Mask
from attnzoo.ops.relative_sdpa.triton import relative_sdpa_triton


def sdpa_triton(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: Mask, scale: float) -> Tensor:
    return relative_sdpa_triton(q_BNTH, k_BKSH, v_BKSH, None, mask, scale)
