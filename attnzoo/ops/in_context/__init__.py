"""Attention of every query to every key, without mask or scale: linear, or with a softmax over the keys.

linear: o_t = sum_s v_s (k_s . q_t); softmax: o_t = sum_s v_s exp(k_s . q_t) / sum_r exp(k_r . q_t) (von Oswald et al.
2023, arXiv 2212.07677, section 2 and appendix A.9). The caller leaves out keys that no token may read. There is no
kernel: the forms are two matrix products.
"""

from typing import Literal

from torch import Tensor

from attnzoo.ops.common.impl import Impl, choose
from attnzoo.ops.common.masks import check_heads
from attnzoo.ops.in_context.reference import in_context_reference
from attnzoo.ops.in_context.torch import in_context_torch

Weighting = Literal["linear", "softmax"]


def in_context_attention(
    q_BNTH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor, *, weighting: Weighting, impl: Impl = "auto"
) -> Tensor:
    """o_BNTH. Raises ValueError when shapes do not fit, or `impl` is not "auto", "reference" or "torch"."""
    check_heads(q_BNTH, k_BNSH, v_BNSH)
    known = {"reference": in_context_reference, "torch": in_context_torch}
    impl = "torch" if impl == "auto" else impl
    out: Tensor = choose("in_context_attention", impl, known, q_BNTH)(q_BNTH, k_BNSH, v_BNSH, weighting)
    return out


__all__ = ["Weighting", "in_context_attention"]
