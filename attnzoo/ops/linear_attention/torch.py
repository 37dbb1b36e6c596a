"""Chunks: inside a chunk the masked product of queries and keys, between chunks the memory.

Time is linear in T: T * C within chunks of C and T * H against the memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.types import accumulation_dtype

CHUNK = 64


def linear_attention_torch(
    q_BNTH: Tensor,
    k_BKTH: Tensor,
    v_BKTH: Tensor,
    decay_K: Tensor | None,
    memory_BKHH: Tensor | None,
    counts_B: Tensor | None,
    normalise: bool,
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(q_BNTH.dtype)
    batch, heads, tokens, head_dim = q_BNTH.shape
    kv_heads = k_BKTH.shape[1]
    q_BKGTH = q_BNTH.view(batch, kv_heads, heads // kv_heads, tokens, head_dim).to(dtype)
    k_BKTH, v_BKTH = k_BKTH.to(dtype), v_BKTH.to(dtype)
    if normalise:
        v_BKTH = F.pad(v_BKTH, (0, 1), value=1.0)
    if counts_B is not None:
        real_BT = torch.arange(tokens, device=q_BNTH.device) < counts_B[:, None]
        # where, not a product: a padded row may hold anything, and 0 * inf is not 0.
        k_BKTH = torch.where(real_BT[:, None, :, None], k_BKTH, 0.0)
        v_BKTH = torch.where(real_BT[:, None, :, None], v_BKTH, 0.0)
    if memory_BKHH is None:
        memory_BKHH = q_BKGTH.new_zeros(batch, kv_heads, head_dim, v_BKTH.shape[-1])

    log_decay_K = torch.zeros(kv_heads, dtype=dtype, device=q_BNTH.device)
    if decay_K is not None:
        log_decay_K = decay_K.to(dtype).log()
    outputs = []
    for start in range(0, tokens, CHUNK):
        chunk = slice(start, start + CHUNK)
        length = min(CHUNK, tokens - start)
        real_B = torch.full((batch,), length, device=q_BNTH.device)
        if counts_B is not None:
            real_B = (counts_B - start).clamp(0, length)
        out, memory_BKHH = _one_chunk(
            q_BKGTH[:, :, :, chunk],
            k_BKTH[:, :, chunk],
            v_BKTH[:, :, chunk],
            log_decay_K,
            memory_BKHH,
            real_B,
        )
        outputs.append(out)
    o_BKGTH = torch.cat(outputs, dim=3)
    if normalise:
        o_BKGTH = o_BKGTH[..., :-1] / o_BKGTH[..., -1:]
    return o_BKGTH.reshape(batch, heads, tokens, -1).to(q_BNTH.dtype), memory_BKHH


def _one_chunk(
    q_BKGTH: Tensor,
    k_BKTH: Tensor,
    v_BKTH: Tensor,
    log_decay_K: Tensor,
    memory_BKHH: Tensor,
    real_B: Tensor,
) -> tuple[Tensor, Tensor]:
    """o_BKGTH of one chunk and the memory after its first `real_B` tokens."""
    steps = torch.arange(k_BKTH.shape[2], device=k_BKTH.device, dtype=k_BKTH.dtype)
    log_K1 = log_decay_K[:, None]
    within_KTT = (log_decay_K[:, None, None] * (steps[:, None] - steps)).tril().exp().tril()
    scores_BKGTT = torch.matmul(q_BKGTH, k_BKTH.mT[:, :, None]) * within_KTT[:, None]
    carried_K1T1 = (log_K1 * (steps + 1)).exp()[:, None, :, None]
    o_BKGTH = torch.matmul(scores_BKGTT, v_BKTH[:, :, None]) + torch.matmul(
        q_BKGTH * carried_K1T1, memory_BKHH[:, :, None]
    )
    # A key of step s is real_B - 1 - s steps old when the chunk ends; padded keys are zero already.
    age_B1T = (real_B[:, None, None] - 1 - steps).clamp(min=0)
    weights_BKT1 = (log_K1 * age_B1T).exp()[..., None]
    kept_BK11 = (log_decay_K * real_B[:, None]).exp()[..., None, None]
    memory_BKHH = kept_BK11 * memory_BKHH + torch.matmul((k_BKTH * weights_BKT1).mT, v_BKTH)
    return o_BKGTH, memory_BKHH
