"""Sinusoids by way of a table where there are many queries, by the angle-difference identities where there are few.

Table: with R[d] = W_R r_d the scores are those of `relative_sdpa`, (q_i + u) . k_j + q_i . R[d] + v . R[d]: once
2 * S * D FLOPs a row of W_R, and then H FLOPs a pair.

Identities: with [a ; b] = W_R^T (q_i + v) split into the sine and cosine halves,
(q_i + v) . W_R r_{i-j} = [a sin(w i) + b cos(w i) ; b sin(w i) - a cos(w i)] . [cos(w j) ; sin(w j)],
so the term is an inner product of a query part and a key part without parameters, D FLOPs a pair: less for a decode
step, since nothing depends on W_R but the query, and (D + H) / (2 H) times more for a long sequence. The key part is
split once more, j = 64 m + n: the query part is turned by each w 64 m, and then meets 64 rows instead of all.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.common.masks import Mask
from attnzoo.ops.common.tables import Tables
from attnzoo.ops.relative_sdpa.torch import relative_sdpa_torch
from attnzoo.ops.sdpa.torch import masked_attention, per_query_head
from attnzoo.ops.sinusoid_sdpa.waves import STRIDE, angles, turns, waves
from attnzoo.types import accumulation_dtype


def sinusoid_sdpa_torch(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    content_bias_NH: Tensor,
    position_bias_NH: Tensor,
    weight_NHD: Tensor,
    mask: Mask,
    scale: float,
) -> Tensor:
    tokens, head_dim = q_BNTH.shape[2:]
    if mask.parallel or mask.ahead or tokens > head_dim:
        reach = mask.reach(tokens, k_BKSH.shape[2])
        tables = as_tables(content_bias_NH, position_bias_NH, weight_NHD, reach)
        return relative_sdpa_torch(q_BNTH, k_BKSH, v_BKSH, tables, mask, scale)
    bias_BNTS = streamed_waves(q_BNTH + position_bias_NH[:, None], weight_NHD * scale, mask)
    return masked_attention(q_BNTH + content_bias_NH[:, None], k_BKSH, v_BKSH, bias_BNTS, mask, scale)


def as_tables(content_bias_NH: Tensor, position_bias_NH: Tensor, weight_NHD: Tensor, reach: tuple[int, int]) -> Tables:
    """The terms as those of `relative_sdpa`, for all distances of `Mask.reach`."""
    behind, ahead = reach
    dtype = accumulation_dtype(weight_NHD.dtype)
    r_PD = waves(max(behind, ahead) + 1, weight_NHD.shape[-1], weight_NHD.device, dtype)
    if ahead:
        r_PD = torch.cat([_mirrored(r_PD[1 : ahead + 1]).flip(0), r_PD[: behind + 1]])
    table_NPH = torch.einsum("pd,nhd->nph", r_PD, weight_NHD.to(dtype))
    table_bias_NP = torch.einsum("nph,nh->np", table_NPH, position_bias_NH.to(dtype))
    return Tables(content_bias_NH, table_NPH.to(weight_NHD.dtype), table_bias_NP.to(weight_NHD.dtype), ahead)


def _mirrored(r_PD: Tensor) -> Tensor:
    """r_{-n} for r_n: sines change their sign, cosines do not."""
    sin, cos = r_PD.chunk(2, dim=-1)
    return torch.cat([-sin, cos], dim=-1)


def streamed_waves(q_BNTH: Tensor, weight_NHD: Tensor, mask: Mask) -> Tensor:
    """(q_i + v) . W_R r_{i-j} for every query and key of a causal mask: [B, N, T, S]."""
    batch, heads, tokens, _ = q_BNTH.shape
    queries_BT, keys_BKS = mask.positions(tokens, tokens, q_BNTH.device)
    width, dtype, device = weight_NHD.shape[-1], accumulation_dtype(q_BNTH.dtype), q_BNTH.device
    a_BNTD, b_BNTD = torch.matmul(q_BNTH.to(dtype), weight_NHD.to(dtype)).chunk(2, dim=-1)
    angle_B1TD = angles(queries_BT, width)[:, None]
    sin, cos = angle_B1TD.sin().to(dtype), angle_B1TD.cos().to(dtype)
    parts_BNTD = torch.complex(b_BNTD * sin - a_BNTD * cos, a_BNTD * sin + b_BNTD * cos)
    # x sin(w j) + y cos(w j) for all positions j at once; keys pick theirs: numbers are cheaper to gather than rows.
    blocks = mask.reach(tokens, tokens)[0] // STRIDE + 1
    turned_BNTMD = torch.view_as_real(parts_BNTD[..., None, :] * turns(blocks, width, device, dtype)).flatten(-2)
    fine_PD = waves(STRIDE, width, device, dtype).unflatten(-1, (2, -1)).mT.flatten(1)
    logits_BNTP = F.linear(turned_BNTMD, fine_PD).flatten(-2)
    index = per_query_head(keys_BKS.clamp(0, logits_BNTP.shape[-1] - 1)[:, :, None], heads)
    return logits_BNTP.gather(-1, index.expand(batch, heads, tokens, -1)).to(q_BNTH.dtype)
