"""One solve per token, with its sum computed from the start: defines the result."""

import torch
from torch import Tensor

from attnzoo.types import accumulation_dtype


def ridge_queries_reference(
    q_BNTH: Tensor,
    k_BKTH: Tensor,
    ridge_K: Tensor,
    gram_BKHH: Tensor | None,
    counts_B: Tensor | None,
    starts_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, head_dim = q_BNTH.shape
    kv_heads = k_BKTH.shape[1]
    dtype = accumulation_dtype(q_BNTH.dtype)
    q, k, ridge = q_BNTH.to(dtype), k_BKTH.to(dtype), ridge_K.to(dtype)
    eye = torch.eye(head_dim, dtype=dtype, device=q.device)
    solved, grams = [], []
    for b in range(batch):
        real = tokens if counts_B is None else int(counts_B[b])
        for n in range(heads):
            kv = n // (heads // kv_heads)
            before = torch.zeros_like(eye) if gram_BKHH is None else gram_BKHH[b, kv].to(dtype)
            gram = before
            for t in range(tokens):
                if t >= real:
                    solved.append(torch.zeros_like(q[b, n, t]))
                    continue
                first = 0 if starts_BT is None else int(starts_BT[b, t])
                gram = before
                for s in range(first, t + 1):
                    gram = gram + torch.outer(k[b, kv, s], k[b, kv, s])
                solved.append(torch.linalg.solve(gram + ridge[kv] * eye, q[b, n, t]))
            if n % (heads // kv_heads) == 0:
                grams.append(gram)
    shape = (batch, kv_heads, head_dim, head_dim)
    return torch.stack(solved).view(q.shape), torch.stack(grams).view(shape)
