"""Causal linear attention: a running sum of outer products, read by each query.

S_t = decay * S_{t-1} + k_t v_t^T,   o_t = q_t . S_t   (normalised: divided by q_t . z_t, z_t the same sum of k_t)
(Katharopoulos et al. 2020, arXiv 2006.16236, eq. 18-20; per-head decay as in RetNet, arXiv 2307.08621, eq. 6).
q and k come with their feature map applied.
"""

from torch import Tensor

from attnzoo.ops.common.impl import Impl, choose, lazily
from attnzoo.ops.common.masks import check_heads
from attnzoo.ops.linear_attention.reference import linear_attention_reference
from attnzoo.ops.linear_attention.torch import linear_attention_torch


def linear_attention(
    q_BNTH: Tensor,
    k_BKTH: Tensor,
    v_BKTH: Tensor,
    *,
    decay_K: Tensor | None = None,
    memory_BKHH: Tensor | None = None,
    counts_B: Tensor | None = None,
    starts_BT: Tensor | None = None,
    normalise: bool = False,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Returns (o_BNTH, memory_BKHH after the chunk).

    The memory is [B, K, H, Hv], and [B, K, H, Hv + 1] with `normalise`: the normaliser is the sum for a value
    that is always 1, kept as the last column. It is accumulated in at least float32. None means zeros.
    `counts_B` says how many of the T tokens of each row are real (right padded); None means all. Padding may hold
    anything and gives zeros.
    `starts_BT` (int64, parallel form: without memory and counts) is the index of the first token each token may see,
    the start of its document in a packed row (see Mask): the memory restarts there, and the one returned is that
    of the last document. Documents are contiguous: a token's start is the token's own index or its predecessor's start.
    Raises ValueError when shapes do not fit, for starts together with memory or counts, or when `impl` is unknown.
    """
    check_heads(q_BNTH, k_BKTH, v_BKTH)
    if q_BNTH.shape[2] != k_BKTH.shape[2]:
        raise ValueError(f"q has {q_BNTH.shape[2]} tokens and k has {k_BKTH.shape[2]}; they must agree")
    width = v_BKTH.shape[-1] + int(normalise)
    expected = (q_BNTH.shape[0], k_BKTH.shape[1], k_BKTH.shape[3], width)
    if memory_BKHH is not None and memory_BKHH.shape != expected:
        raise ValueError(f"memory {tuple(memory_BKHH.shape)} must be {expected} with normalise={normalise}")
    if decay_K is not None and decay_K.shape != k_BKTH.shape[1:2]:
        raise ValueError(f"decay {tuple(decay_K.shape)} must be {tuple(k_BKTH.shape[1:2])}, one a kv head")
    if starts_BT is not None and (memory_BKHH is not None or counts_B is not None):
        raise ValueError("starts_BT belongs to the parallel form; memory_BKHH and counts_B to the streaming one")
    if starts_BT is not None and starts_BT.shape != (q_BNTH.shape[0], q_BNTH.shape[2]):
        raise ValueError(f"starts_BT has shape {tuple(starts_BT.shape)}; it must be [batch, time] of q {q_BNTH.shape}")
    known = {
        "reference": linear_attention_reference,
        "torch": linear_attention_torch,
        "triton": lazily("attnzoo.ops.linear_attention.triton", "linear_attention_triton"),
    }
    run = choose("linear_attention", impl, known, q_BNTH)
    out: tuple[Tensor, Tensor] = run(q_BNTH, k_BKTH, v_BKTH, decay_K, memory_BKHH, counts_B, starts_BT, normalise)
    return out


__all__ = ["linear_attention"]
