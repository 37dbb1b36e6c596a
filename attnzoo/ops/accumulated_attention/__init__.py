"""How much attention each key got: the column sums that token eviction decides by.

accumulated_j = sum over queries i, and over the query heads of j's kv head, of softmax_j(A_ij), with the scores of
`sdpa` or of `relative_sdpa` (Zhang et al. 2023, arXiv 2306.14048; D2O: Wan et al., arXiv 2406.13035).
Computed a block of query rows at a time: memory is linear in the number of keys.
"""

from torch import Tensor

from attnzoo.ops.accumulated_attention.reference import accumulated_attention_reference
from attnzoo.ops.accumulated_attention.torch import accumulated_attention_torch
from attnzoo.ops.common.impl import Impl, choose, lazily
from attnzoo.ops.common.masks import CAUSAL, Mask, check_heads, check_mask
from attnzoo.ops.common.pair_bias import PairBias
from attnzoo.ops.common.tables import Tables

IMPLEMENTATIONS = {
    "reference": accumulated_attention_reference,
    "torch": accumulated_attention_torch,
    "triton": lazily("attnzoo.ops.accumulated_attention.triton", "accumulated_attention_triton"),
}


def accumulated_attention(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    *,
    mask: Mask = CAUSAL,
    counts_B: Tensor | None = None,
    tables: Tables | PairBias | None = None,
    log_counts_BKS: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Returns accumulated_BKS in the accumulation dtype, 0 for keys that no query sees.

    counts_B: how many queries of each row are real (None: all); others add nothing. tables: the relative terms of
    `relative_sdpa`, or the bias of `pairwise_sdpa`, for which there are no kernels. log_counts_BKS: added to the
    logits. No gradients. Raises ValueError as `sdpa`, and for masks that no cache has: not causal, with a prefix,
    documents, keys that do not exist, or pairs.
    """
    check_heads(q_BNTH, k_BKSH, k_BKSH)
    check_mask(mask, q_BNTH, k_BKSH)
    others = [name for name in ("prefix_B", "starts_BT", "keys_BS", "pairs") if getattr(mask, name) is not None]
    if others or not mask.causal:
        raise ValueError(
            "accumulated_attention is for sequences that are cached: it takes causal masks with window, sinks and "
            f"positions, and not {' and '.join(others) or 'causal=False'}"
        )
    tables = tables.past() if isinstance(tables, Tables) else tables
    known = {k: v for k, v in IMPLEMENTATIONS.items() if k != "triton" or not isinstance(tables, PairBias)}
    run = choose("accumulated_attention", impl, known, q_BNTH)
    out: Tensor = run(q_BNTH, k_BKSH, mask, counts_B, tables, log_counts_BKS, q_BNTH.shape[-1] ** -0.5)
    return out


__all__ = ["Tables", "accumulated_attention"]
