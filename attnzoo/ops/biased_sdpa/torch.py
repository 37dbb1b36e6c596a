"""The parallel form in blocks of rows; in streaming, the bias of every pair added by torch's attention."""

from torch import Tensor

from attnzoo.ops.common.masks import CausalMask
from attnzoo.ops.common.row_blocks import Tables, row_block_attention
from attnzoo.ops.relative_sdpa.torch import streamed_bias
from attnzoo.ops.sdpa.torch import masked_attention, per_query_head


def biased_sdpa_torch(
    q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, bias_NP: Tensor, mask: CausalMask, scale: float
) -> Tensor:
    tables = Tables.of_bias(bias_NP, q_BNTH.shape[-1], scale)
    if mask.parallel:
        return row_block_attention(q_BNTH, k_BKSH, v_BKSH, tables, mask, scale)
    tokens, heads = q_BNTH.shape[2], q_BNTH.shape[1]
    bias_BNTS = streamed_bias(q_BNTH, tables.table_NPH, tables.table_bias_NP, mask, scale)
    visible_BNTS = per_query_head(mask.visible(tokens, q_BNTH.device), heads)
    return masked_attention(q_BNTH, k_BKSH, v_BKSH, bias_BNTS, visible_BNTS, scale)
