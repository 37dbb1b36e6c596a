"""The sums over keys, one query at a time: defines the result."""

import torch
from torch import Tensor

from attnzoo.types import accumulation_dtype


def in_context_reference(q_BNTH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor, weighting: str) -> Tensor:
    dtype = accumulation_dtype(q_BNTH.dtype)
    q, k, v = (x.to(dtype) for x in (q_BNTH, k_BNSH, v_BNSH))
    rows = []
    for t in range(q.shape[2]):
        scores = [(q[:, :, t] * k[:, :, s]).sum(-1, keepdim=True) for s in range(k.shape[2])]
        if weighting == "softmax":
            top = torch.stack(scores).amax(0)
            scores = [(score - top).exp() for score in scores]
            total = sum(scores, torch.zeros_like(top))
            scores = [score / total for score in scores]
        rows.append(sum((score * v[:, :, s] for s, score in enumerate(scores)), torch.zeros_like(v[:, :, 0])))
    return torch.stack(rows, dim=2).to(q_BNTH.dtype)
