"""The same sums as products of matrices, a depthwise convolution and a softmax."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def label_attention_torch(
    tokens_BTE: Tensor, labels_KE: Tensor, kernel_KW: Tensor, bias_K: Tensor, exist_BT: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    labels, width = kernel_KW.shape
    gone_BT1 = None if exist_BT is None else ~exist_BT[..., None]
    if gone_BT1 is not None:  # before the product: what is not there may be NaN
        tokens_BTE = tokens_BTE.masked_fill(gone_BT1, 0.0)
    scores_BTK = (tokens_BTE / math.sqrt(tokens_BTE.shape[-1])) @ labels_KE.mT
    if not scores_BTK.shape[1]:
        return scores_BTK, scores_BTK, scores_BTK[..., 0]
    near_BKT = F.conv1d(scores_BTK.mT, kernel_KW[:, None], bias_K, padding=width // 2, groups=labels)
    evidence_BTK = near_BKT.mT.relu()
    if gone_BT1 is None:
        return scores_BTK, evidence_BTK, evidence_BTK.amax(-1).softmax(-1)
    evidence_BTK = evidence_BTK.masked_fill(gone_BT1, 0.0)
    most_BT, gone_BT = evidence_BTK.amax(-1), gone_BT1[..., 0]
    most_BT = most_BT.masked_fill(gone_BT, torch.finfo(most_BT.dtype).min)
    return scores_BTK, evidence_BTK, most_BT.softmax(-1).masked_fill(gone_BT, 0.0)
