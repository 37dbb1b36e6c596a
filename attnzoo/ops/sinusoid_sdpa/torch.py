"""The relative term by the angle-difference identities, as an additive bias for torch's attention.

With [a ; b] = W_R^T (q_i + v) split into the sine and cosine halves,
(q_i + v) . W_R r_{i-j} = [a sin(w i) + b cos(w i) ; b sin(w i) - a cos(w i)] . [cos(w j) ; sin(w j)],
so the term is an inner product of a query part and a key part without parameters: no shift, no table of T x D.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.masks import aligned_positions, causal_mask
from attnzoo.ops.sdpa.torch import per_query_head
from attnzoo.types import accumulation_dtype


def sinusoid_sdpa_torch(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    content_bias_NH: Tensor,
    position_bias_NH: Tensor,
    weight_NHD: Tensor,
    query_positions_BT: Tensor | None,
    key_positions_BKS: Tensor | None,
) -> Tensor:
    heads = q_BNTH.shape[1]
    scale = q_BNTH.shape[-1] ** -0.5
    if query_positions_BT is None or key_positions_BKS is None:
        query_positions_BT, key_positions_BKS = aligned_positions(q_BNTH.shape[2], q_BNTH.device)
    # Angles grow with the position: in half precision a position of a few thousand has no phase left.
    dtype = accumulation_dtype(q_BNTH.dtype)
    query_BNTD = torch.matmul((q_BNTH + position_bias_NH[:, None]).to(dtype), (weight_NHD * scale).to(dtype))
    a, b = query_BNTD.chunk(2, dim=-1)
    sin_i, cos_i = _angles(query_positions_BT[:, None], weight_NHD.shape[-1], dtype)
    rotated_BNTD = torch.cat([a * sin_i + b * cos_i, b * sin_i - a * cos_i], dim=-1)
    sin_j, cos_j = _angles(key_positions_BKS, weight_NHD.shape[-1], dtype)
    waves_BKSD = torch.cat([cos_j, sin_j], dim=-1)
    if waves_BKSD.shape[1] not in (1, heads):
        waves_BKSD = waves_BKSD.repeat_interleave(heads // waves_BKSD.shape[1], dim=1)
    bias_BNTS = torch.matmul(rotated_BNTD, waves_BKSD.mT).to(q_BNTH.dtype)
    mask_BNTS = per_query_head(causal_mask(query_positions_BT, key_positions_BKS), heads)
    return F.scaled_dot_product_attention(
        q_BNTH + content_bias_NH[:, None],
        k_BKSH,
        v_BKSH,
        attn_mask=bias_BNTS.masked_fill(~mask_BNTS, float("-inf")),
        scale=scale,
        enable_gqa=heads != k_BKSH.shape[1],
    )


def _angles(positions: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(sin, cos) of position * w_t, each [..., width / 2]."""
    exponents = torch.arange(0, width, 2, dtype=dtype, device=positions.device) / width
    angles = positions.to(dtype)[..., None] * 10000.0**-exponents
    return angles.sin(), angles.cos()
