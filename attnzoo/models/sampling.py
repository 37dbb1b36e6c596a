"""From logits to the next token."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn, as `sample` takes it; by default the most likely one."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


def filter_logits(logits_BV: Tensor, top_k: int, top_p: float) -> Tensor:
    """logits_BV with -inf for all but the top_k largest (0: all) and the smallest set of mass top_p (1.0: all).

    The most likely token always stays. The set of mass top_p is taken after top_k (nucleus sampling, Holtzman
    et al. 2019, arXiv 1904.09751). Raises ValueError for top_k < 0 or top_p outside (0, 1].
    """
    if top_k < 0:
        raise ValueError(f"top_k={top_k} must be 0 (off) or at least 1")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p={top_p} must be greater than 0 and at most 1")
    if 0 < top_k < logits_BV.shape[-1]:
        smallest_B1 = logits_BV.topk(top_k, dim=-1).values[..., -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, float("-inf"))
    if top_p < 1.0:
        ordered_BV, index_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        mass_before_BV = ordered_BV.softmax(-1).cumsum(-1) - ordered_BV.softmax(-1)
        drop_BV = (mass_before_BV >= top_p).index_fill(-1, torch.zeros(1, dtype=torch.long), False)
        logits_BV = logits_BV.masked_fill(torch.zeros_like(drop_BV).scatter(-1, index_BV, drop_BV), float("-inf"))
    return logits_BV


def sample(
    logits_BV: Tensor, temperature: float, top_p: float, top_k: int, generator: torch.Generator | None = None
) -> Tensor:
    """tokens_B drawn from softmax(logits / temperature) after filtering; temperature 0 takes the largest logit.

    Raises ValueError for a negative temperature, and as `filter_logits`.
    """
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or positive")
    if temperature == 0:
        return logits_BV.argmax(-1)
    probabilities = filter_logits(logits_BV.float() / temperature, top_k, top_p).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
