"""One query at a time: what is right."""

from torch import Tensor

from attnzoo.ops.common.masks import Mask
from attnzoo.ops.common.pair_bias import PairBias
from attnzoo.ops.sdpa.reference import attend_reference


def pairwise_sdpa_reference(
    q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, bias: PairBias, mask: Mask, scale: float
) -> Tensor:
    def score(b: int, n: int, q_H: Tensor, k_JH: Tensor, i: Tensor, j_J: Tensor) -> Tensor:
        if mask.starts_BT is not None:  # positions are counted from the start of the document
            i, j_J = i - mask.starts_BT[b, i], j_J - mask.starts_BT[b, i]
        return scale * (k_JH @ q_H) + bias.of_query(i, j_J, n).to(q_H.dtype)

    out: Tensor = attend_reference(q_BNTH, k_BKSH, v_BKSH, mask, score)
    return out
