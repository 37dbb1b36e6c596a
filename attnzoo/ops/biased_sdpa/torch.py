"""The parallel form in blocks of rows; in streaming, the bias of every pair added by torch's attention."""

from torch import Tensor

from attnzoo.ops.common.masks import Mask
from attnzoo.ops.common.row_blocks import row_block_attention
from attnzoo.ops.common.tables import Tables
from attnzoo.ops.relative_sdpa.torch import streamed_bias
from attnzoo.ops.sdpa.torch import in_row_blocks, masked_attention


def biased_sdpa_torch(
    q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, bias_NP: Tensor, future_rows: int, mask: Mask, scale: float
) -> Tensor:
    tables = Tables.of_bias(bias_NP, q_BNTH.shape[-1], scale, future_rows)
    if in_row_blocks(mask):
        return row_block_attention(q_BNTH, k_BKSH, v_BKSH, tables, mask, scale)
    positions = mask.positions(q_BNTH.shape[2], k_BKSH.shape[2], q_BNTH.device)
    bias_BNTS = streamed_bias(q_BNTH, tables, positions, scale)
    return masked_attention(q_BNTH, k_BKSH, v_BKSH, bias_BNTS, mask, scale)
