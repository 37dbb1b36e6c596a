"""One query at a time: what is right."""

from torch import Tensor

from attnzoo.ops.common.masks import CausalMask
from attnzoo.ops.sdpa.reference import attend_reference


def relative_sdpa_reference(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    content_bias_NH: Tensor,
    table_NPH: Tensor,
    table_bias_NP: Tensor,
    mask: CausalMask,
    scale: float,
) -> Tensor:
    last = table_bias_NP.shape[-1] - 1

    def score(b: int, n: int, q_H: Tensor, k_JH: Tensor, i: Tensor, j_J: Tensor) -> Tensor:
        row_J = (i - j_J).clamp(max=last)
        content = k_JH @ (q_H + content_bias_NH[n])
        return scale * (content + table_NPH[n][row_J] @ q_H + table_bias_NP[n][row_J])

    out: Tensor = attend_reference(q_BNTH, k_BKSH, v_BKSH, mask, score)
    return out
