"""Sinusoids by way of a table, for the kernels of `relative_sdpa`."""

from torch import Tensor

from attnzoo.ops.common.masks import CausalMask
from attnzoo.ops.relative_sdpa.triton import relative_sdpa_triton
from attnzoo.ops.sinusoid_sdpa.torch import as_tables, farthest


def sinusoid_sdpa_triton(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    content_bias_NH: Tensor,
    position_bias_NH: Tensor,
    weight_NHD: Tensor,
    mask: CausalMask,
    scale: float,
) -> Tensor:
    tables = as_tables(weight_NHD, position_bias_NH, farthest(mask, q_BNTH.shape[2]) + 1)
    return relative_sdpa_triton(q_BNTH, k_BKSH, v_BKSH, content_bias_NH, *tables, mask, scale)
