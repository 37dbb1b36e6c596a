"""Transformer-XL's relative attention with sinusoids.

A_ij = q_i . k_j + q_i . (W_R r_{i-j}) + u . k_j + v . (W_R r_{i-j}),  o_i = sum_j softmax_j(scale * A_ij) value_j
with r_n = [sin(n w) ; cos(n w)], w_t = 10000^(-2t/D) (Dai et al. 2019, arXiv 1901.02860, section 3.3), for keys before
the query and, under masks that show them, after it: n may have either sign.
"""

from torch import Tensor

from attnzoo.ops.common.impl import Impl, choose, lazily
from attnzoo.ops.common.masks import CAUSAL, Mask, check_heads, check_mask
from attnzoo.ops.sinusoid_sdpa.reference import sinusoid_sdpa_reference
from attnzoo.ops.sinusoid_sdpa.torch import sinusoid_sdpa_torch

IMPLEMENTATIONS = {
    "reference": sinusoid_sdpa_reference,
    "torch": sinusoid_sdpa_torch,
    "triton": lazily("attnzoo.ops.sinusoid_sdpa.triton", "sinusoid_sdpa_triton"),
}


def sinusoid_sdpa(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    *,
    content_bias_NH: Tensor,
    position_bias_NH: Tensor,
    weight_NHD: Tensor,
    mask: Mask = CAUSAL,
    impl: Impl = "auto",
) -> Tensor:
    """Returns o_BNTH; content_bias is u, position_bias is v, weight is W_R per head; the scale is 1/sqrt(H).

    D, the number of sinusoids, must be even. Memory of the parallel form is linear in T, forward and backward, but for
    pairs. A query that sees no key gets zeros. Raises ValueError when shapes do not fit or `impl` is unknown or cannot
    run here.
    """
    check_heads(q_BNTH, k_BKSH, v_BKSH)
    check_mask(mask, q_BNTH, k_BKSH)
    expected = (q_BNTH.shape[1], q_BNTH.shape[3])
    shapes = {
        "content_bias": tuple(content_bias_NH.shape),
        "position_bias": tuple(position_bias_NH.shape),
        "weight": tuple(weight_NHD.shape[:2]),
    }
    for name, shape in shapes.items():
        if shape != expected:
            raise ValueError(f"{name} starts with {shape}; it must be [heads, head_dim] = {expected}")
    if weight_NHD.shape[2] % 2:
        raise ValueError(f"weight has {weight_NHD.shape[2]} sinusoids; sines and cosines need an even number")
    run = choose("sinusoid_sdpa", impl, IMPLEMENTATIONS, q_BNTH)
    out: Tensor = run(
        q_BNTH, k_BKSH, v_BKSH, content_bias_NH, position_bias_NH, weight_NHD, mask, q_BNTH.shape[-1] ** -0.5
    )
    return out


__all__ = ["sinusoid_sdpa"]
