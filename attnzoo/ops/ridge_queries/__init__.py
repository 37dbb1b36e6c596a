"""Queries solved against the running sum of their keys' outer products: q_t <- (sum_{s<=t} k_s k_s^T + ridge I)^-1 q_t.

With them linear attention is ridge regression at every token (von Oswald et al. 2023, "Uncovering mesa-optimization
algorithms in Transformers", arXiv 2309.05858, section 4): sum_s v_s k_s^T (sum_s k_s k_s^T + ridge I)^-1 q_t.
There is no kernel: a solve is torch's on every device.
"""

from torch import Tensor

from attnzoo.ops.common.impl import Impl, choose
from attnzoo.ops.ridge_queries.reference import ridge_queries_reference
from attnzoo.ops.ridge_queries.torch import ridge_queries_torch


def ridge_queries(
    q_BNTH: Tensor,
    k_BKTH: Tensor,
    ridge_K: Tensor,
    *,
    gram_BKHH: Tensor | None = None,
    counts_B: Tensor | None = None,
    starts_BT: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """(solved_BNTH, gram_BKHH after the chunk), both in at least float32. ridge_K: positive, one per kv head.

    `gram_BKHH`: the sum before the chunk, None: zeros. `counts_B`, `starts_BT`: as in `linear_attention`; padding may
    hold anything and gives zeros. Raises ValueError when shapes do not fit or `impl` is not "auto", "reference" or
    "torch".
    """
    q, k = tuple(q_BNTH.shape), tuple(k_BKTH.shape)
    if len(q) != 4 or len(k) != 4 or q[0] != k[0] or q[2:] != k[2:] or q[1] % k[1] or ridge_K.shape != k[1:2]:
        raise ValueError(
            f"q={q}, k={k}, ridge={tuple(ridge_K.shape)} do not fit: [batch, heads, time, head_dim] must agree but for "
            "heads, query heads be a multiple of kv heads, and ridge hold one number per kv head"
        )
    if gram_BKHH is not None and gram_BKHH.shape != (q[0], k[1], q[3], q[3]):
        raise ValueError(f"gram {tuple(gram_BKHH.shape)} must be {(q[0], k[1], q[3], q[3])}")
    if starts_BT is not None and (gram_BKHH is not None or counts_B is not None):
        raise ValueError("starts_BT belongs to the parallel form; gram_BKHH and counts_B to the streaming one")
    known = {"reference": ridge_queries_reference, "torch": ridge_queries_torch}
    run = choose("ridge_queries", "torch" if impl == "auto" else impl, known, q_BNTH)
    out: tuple[Tensor, Tensor] = run(q_BNTH, k_BKTH, ridge_K, gram_BKHH, counts_B, starts_BT)
    return out


__all__ = ["ridge_queries"]
