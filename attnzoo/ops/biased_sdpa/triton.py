"""The bias on a GPU, by the kernels of relative attention.

They multiply queries with a table of all channels, so a bias alone takes a table of zeros here: as much memory as its
distances have keys.
"""

from torch import Tensor

from attnzoo.ops.common.masks import Mask
from attnzoo.ops.common.tables import Tables
from attnzoo.ops.relative_sdpa.triton import relative_sdpa_triton


def biased_sdpa_triton(
    q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, bias_NP: Tensor, future_rows: int, mask: Mask, scale: float
) -> Tensor:
    tables = Tables.of_bias(bias_NP, q_BNTH.shape[-1], scale, future_rows).whole(q_BNTH.shape[-1])
    return relative_sdpa_triton(q_BNTH, k_BKSH, v_BKSH, tables, mask, scale)
