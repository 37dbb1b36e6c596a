"""One query at a time, with r_{i-j} written out: what is right."""

import torch
from torch import Tensor

from attnzoo.ops.common.masks import Mask
from attnzoo.ops.sdpa.reference import attend_reference


def sinusoid_sdpa_reference(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    content_bias_NH: Tensor,
    position_bias_NH: Tensor,
    weight_NHD: Tensor,
    mask: Mask,
    scale: float,
) -> Tensor:
    width = weight_NHD.shape[-1]

    def score(b: int, n: int, q_H: Tensor, k_JH: Tensor, i: Tensor, j_J: Tensor) -> Tensor:
        exponents = torch.arange(0, width, 2, dtype=q_H.dtype, device=q_H.device) / width
        angles = (i - j_J).to(q_H.dtype)[:, None] * 10000.0**-exponents
        r_JD = torch.cat([angles.sin(), angles.cos()], dim=-1)
        relative_JH = r_JD @ weight_NHD[n].T
        content = k_JH @ (q_H + content_bias_NH[n])
        return scale * (content + relative_JH @ (q_H + position_bias_NH[n]))

    out: Tensor = attend_reference(q_BNTH, k_BKSH, v_BKSH, mask, score)
    return out
