"""One query at a time: what is right."""

from torch import Tensor

from attnzoo.ops.common.masks import Mask
from attnzoo.ops.sdpa.reference import attend_reference


def biased_sdpa_reference(
    q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, bias_NP: Tensor, future_rows: int, mask: Mask, scale: float
) -> Tensor:
    last = bias_NP.shape[1] - 1

    def score(b: int, n: int, q_H: Tensor, k_JH: Tensor, i: Tensor, j_J: Tensor) -> Tensor:
        bias_J = bias_NP[n][(i - j_J + future_rows).clamp(0, last)]
        return scale * (k_JH @ q_H) + bias_J.to(q_H.dtype)

    out: Tensor = attend_reference(q_BNTH, k_BKSH, v_BKSH, mask, score)
    return out
