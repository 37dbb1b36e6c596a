"""Sinusoids by way of a table, for the kernels of `relative_sdpa`."""

from torch import Tensor

from attnzoo.ops.common.masks import Mask
from attnzoo.ops.relative_sdpa.triton import relative_sdpa_triton
from attnzoo.ops.sinusoid_sdpa.torch import as_tables


def sinusoid_sdpa_triton(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    content_bias_NH: Tensor,
    position_bias_NH: Tensor,
    weight_NHD: Tensor,
    mask: Mask,
    scale: float,
) -> Tensor:
    reach = mask.reach(q_BNTH.shape[2], k_BKSH.shape[2])
    tables = as_tables(content_bias_NH, position_bias_NH, weight_NHD, reach)
    return relative_sdpa_triton(q_BNTH, k_BKSH, v_BKSH, tables, mask, scale)
