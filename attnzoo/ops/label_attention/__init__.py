"""Weights of tokens by the labels they speak of, for a weighted sum of the whole sequence.

Source: "Label Dependent Attention Model for Disease Risk Prediction Using Multimodal Electronic Health Records"
(2022, arXiv 2201.06779), with the compatibility of tokens and labels of LEAM (2018, arXiv 1805.04174).

    G = (tokens / sqrt(E)) labels^T,   u_lk = relu(sum_w kernel[k, w] G[l - (W-1)/2 + w, k] + bias_k)
    m_l = max_k u_lk,                  beta = softmax over the tokens that exist of m

It is no attention variant: a variant gives every token an output, and this gives one set of weights for the whole
sequence, the same for all labels after the max; so there is nothing to stream and no query to mask.

Differs from the paper: tokens that do not exist take no part, neither in the softmax nor as neighbours in the
convolution (the authors' code hides nothing). Each label has a kernel of its own, so that u of a label speaks of that
label alone; the paper's formula does not say whether labels mix there.
"""

from typing import NamedTuple

from torch import Tensor
from torch import bool as torch_bool  # the name torch is that of the module beside this file

from attnzoo.ops.common.impl import Impl, choose
from attnzoo.ops.label_attention.reference import label_attention_reference
from attnzoo.ops.label_attention.torch import label_attention_torch


class LabelWeights(NamedTuple):
    """G, u and beta; in rows of tokens that do not exist they are zeros.

    scores_BTK: compatibility of token and label; evidence_BTK: it and its neighbours', where they speak for the label;
    weights_BT: how much of the sum a token is, 1 in all, or zeros for a sequence without tokens.
    """

    scores_BTK: Tensor
    evidence_BTK: Tensor
    weights_BT: Tensor


def label_attention(
    tokens_BTE: Tensor,
    labels_KE: Tensor,
    kernel_KW: Tensor,
    bias_K: Tensor,
    *,
    exist_BT: Tensor | None = None,
    impl: Impl = "auto",
) -> LabelWeights:
    """Here K counts labels and E is the width they share with tokens. exist_BT (bool): which tokens there are, None:
    all; the others may hold anything. Raises ValueError when shapes do not fit, for an even width of the kernel, for no
    labels, and when `impl` is not "auto", "reference" or "torch"."""
    tokens, labels = tuple(tokens_BTE.shape), tuple(labels_KE.shape)
    if len(tokens) != 3 or len(labels) != 2 or tokens[2] != labels[1] or not all(labels):
        raise ValueError(
            f"tokens {tokens} must be [batch, tokens, width], and labels {labels} [labels, width] with at least one"
        )
    if kernel_KW.dim() != 2 or len(kernel_KW) != labels[0] or kernel_KW.shape[1] % 2 == 0:
        raise ValueError(f"kernel {tuple(kernel_KW.shape)} must be [{labels[0]}, width], of an odd width")
    if bias_K.shape != labels[:1]:
        raise ValueError(f"bias {tuple(bias_K.shape)} must be [{labels[0]}], one for each label")
    if exist_BT is not None and (exist_BT.shape != tokens[:2] or exist_BT.dtype != torch_bool):
        raise ValueError(
            f"exist_BT {tuple(exist_BT.shape)} of {exist_BT.dtype} must be {tokens[:2]}, as tokens, and bool"
        )
    known = {"reference": label_attention_reference, "torch": label_attention_torch}
    run = choose("label_attention", "torch" if impl == "auto" else impl, known, tokens_BTE)
    return LabelWeights(*run(tokens_BTE, labels_KE, kernel_KW, bias_K, exist_BT))


__all__ = ["LabelWeights", "label_attention"]
