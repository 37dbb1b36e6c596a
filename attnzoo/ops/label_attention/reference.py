"""The sums of the definition, token by token and label by label: defines the result."""

import math

import torch
from torch import Tensor


def label_attention_reference(
    tokens_BTE: Tensor, labels_KE: Tensor, kernel_KW: Tensor, bias_K: Tensor, exist_BT: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows = [
        _sequence(tokens_BTE[b], labels_KE, kernel_KW, bias_K, None if exist_BT is None else exist_BT[b].tolist())
        for b in range(len(tokens_BTE))
    ]
    if not rows:
        none_BTK = tokens_BTE.new_zeros(*tokens_BTE.shape[:2], len(labels_KE))
        return none_BTK, none_BTK, none_BTK[..., 0]
    scores, evidence, weights = zip(*rows, strict=True)
    return torch.stack(scores), torch.stack(evidence), torch.stack(weights)


def _sequence(
    tokens_TE: Tensor, labels_KE: Tensor, kernel_KW: Tensor, bias_K: Tensor, exist: list[bool] | None
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, labels, width = len(tokens_TE), *kernel_KW.shape
    zero = tokens_TE.new_zeros(())
    real = [t for t in range(tokens) if exist is None or exist[t]]
    scale = 1.0 / math.sqrt(tokens_TE.shape[1])

    scores = {(t, k): (tokens_TE[t] * labels_KE[k]).sum() * scale for t in real for k in range(labels)}
    evidence = {}
    for t, k in scores:
        taps = [kernel_KW[k, w] * scores.get((t - width // 2 + w, k), zero) for w in range(width)]
        evidence[t, k] = torch.relu(sum(taps, bias_K[k]))
    most = {t: torch.stack([evidence[t, k] for k in range(labels)]).max() for t in real}
    total = sum((torch.exp(most[t] - max(most.values())) for t in real), zero)
    weights = {t: torch.exp(most[t] - max(most.values())) / total for t in real}

    def table(found: dict[tuple[int, int], Tensor]) -> Tensor:
        cells = [found.get((t, k), zero) for t in range(tokens) for k in range(labels)]
        return torch.stack(cells).view(tokens, labels) if cells else tokens_TE.new_zeros(tokens, labels)

    shares = [weights.get(t, zero) for t in range(tokens)]
    return table(scores), table(evidence), torch.stack(shares) if shares else tokens_TE.new_zeros(0)
