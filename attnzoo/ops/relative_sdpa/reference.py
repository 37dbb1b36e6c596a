"""One query at a time: what is right."""

from torch import Tensor

from attnzoo.ops.common.masks import Mask
from attnzoo.ops.common.tables import Tables
from attnzoo.ops.sdpa.reference import attend_reference


def relative_sdpa_reference(
    q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, tables: Tables, mask: Mask, scale: float
) -> Tensor:
    table_NPH, table_bias_NP = tables.table_NPH, tables.table_bias_NP
    last = table_bias_NP.shape[-1] - 1

    def score(b: int, n: int, q_H: Tensor, k_JH: Tensor, i: Tensor, j_J: Tensor) -> Tensor:
        row_J = (i - j_J + tables.future_rows).clamp(0, last)
        content = k_JH @ (q_H + tables.content_bias_NH[n])
        return scale * (content + table_NPH[n][row_J] @ q_H + table_bias_NP[n][row_J])

    out: Tensor = attend_reference(q_BNTH, k_BKSH, v_BKSH, mask, score)
    return out
