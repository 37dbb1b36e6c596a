"""Linear: the sum of outer products first, so that time is linear in the tokens; softmax: torch's fused attention."""

import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.common.negligible import attention_of_peaked
from attnzoo.ops.sdpa.torch import peaked_backward
from attnzoo.types import accumulation_dtype


def in_context_torch(q_BNTH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor, weighting: str) -> Tensor:
    if weighting == "softmax":
        if peaked_backward(q_BNTH, k_BNSH, v_BNSH, scale=1.0):
            return attention_of_peaked(q_BNTH, k_BNSH, v_BNSH, None, None, 1.0)
        return F.scaled_dot_product_attention(q_BNTH, k_BNSH, v_BNSH, scale=1.0)
    dtype = accumulation_dtype(q_BNTH.dtype)
    memory_BNHH = k_BNSH.to(dtype).mT @ v_BNSH.to(dtype)
    return (q_BNTH.to(dtype) @ memory_BNHH).to(q_BNTH.dtype)
