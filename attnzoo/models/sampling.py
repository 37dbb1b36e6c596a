"""From logits to the next token."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

GREEDY_BELOW = 1e-5
"""Temperatures below this take the most likely token: dividing by less overflows float32 logits, and a draw would
hardly ever give another token."""
FLAT = 1e30
"""From this temperature on, all tokens are equally likely in float32."""
NOT_FINITE = "the model's logits are not finite numbers: its weights, or the precision it runs in, are at fault"
EDITED_NOT_FINITE = (
    "the model's logits are not finite numbers with these edits: their numbers, alone or together, are too large for "
    "the model's dtype; give smaller ones"
)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely a token was under the model, before temperature, top_k and top_p.

    logprob: natural logarithm of its probability. top: (token, logprob) of the most likely tokens, best first. offset:
    characters of the text before the token.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    offset: int = 0


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn, as `sample` takes it; by default the most likely one. Raises ValueError naming the
    field for a value out of range."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_p, self.top_k)


def check_sampling(temperature: float, top_p: float, top_k: int) -> None:
    """Raises ValueError that names the field for options that `sample` refuses."""
    # Comparisons with NaN are false; isfinite fails for integers that no float can hold.
    if not (temperature >= 0 and (isinstance(temperature, int) or math.isfinite(temperature))):
        raise ValueError(f"temperature={temperature} must be a number, 0 (greedy) or positive")
    if top_k < 0:
        raise ValueError(f"top_k={top_k} must be 0 (off) or at least 1")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p={top_p} must be greater than 0 and at most 1")


def greedy(temperature: float) -> bool:
    """Whether this temperature takes the most likely token."""
    return temperature < GREEDY_BELOW


def filter_logits(logits_BV: Tensor, top_k: int, top_p: float) -> Tensor:
    """logits_BV with -inf for all but the top_k largest (0: all) and the smallest set of probability top_p (1.0: all).

    The most likely token always stays. top_p is applied after top_k (nucleus sampling, Holtzman et al. 2019, arXiv
    1904.09751). Raises ValueError for top_k < 0 or top_p outside (0, 1].
    """
    check_sampling(0.0, top_p, top_k)
    if 0 < top_k < logits_BV.shape[-1]:
        smallest_B1 = logits_BV.topk(top_k, dim=-1).values[..., -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, float("-inf"))
    if top_p < 1.0:
        ordered_BV, index_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        mass_BV = ordered_BV.softmax(-1)
        drop_BV = mass_BV.cumsum(-1) - mass_BV >= top_p
        drop_BV[..., 0] = False  # also where top_p rounds to 0
        logits_BV = logits_BV.masked_fill(torch.zeros_like(drop_BV).scatter(-1, index_BV, drop_BV), float("-inf"))
    return logits_BV


def sample(
    logits_BV: Tensor, temperature: float, top_p: float, top_k: int, generator: torch.Generator | None = None
) -> Tensor:
    """tokens_B drawn from softmax(logits / temperature) after filtering; a temperature below `GREEDY_BELOW` takes the
    largest logit.

    Raises ValueError for options out of range, and for logits of which the largest is not a finite number.
    """
    check_sampling(temperature, top_p, top_k)
    # NaN is larger than everything.
    largest_B1, best_B1 = logits_BV.max(-1, keepdim=True)
    if not bool(largest_B1.isfinite().all()):
        raise ValueError(NOT_FINITE)
    if greedy(temperature):
        return best_B1[..., 0]
    # The largest is 0, so none overflows to inf; those that overflow to -inf have probability 0.
    scaled_BV = (logits_BV.float() - largest_B1.float()) / float(min(temperature, FLAT))
    probabilities = filter_logits(scaled_BV, top_k, top_p).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def best_tokens(logits_BV: Tensor) -> list[int | None]:
    """The most likely token of each row, None where the logits are not finite; a device is waited for once."""
    largest_B, best_B = logits_BV.max(-1)  # NaN is larger than everything
    return [None if token < 0 else token for token in best_B.masked_fill(~largest_B.isfinite(), -1).tolist()]


def token_logprobs(logits_V: Tensor, token: int, alternatives: int) -> TokenLogprobs:
    """`TokenLogprobs` of `token`, with the `alternatives` most likely tokens."""
    values_V = logits_V.float().log_softmax(-1)
    best = values_V.topk(min(alternatives, len(values_V)))
    top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return TokenLogprobs(token, float(values_V[token]), tuple(top))


def choice_seed(seed: int, choice: int) -> int:
    """The seed of continuation `choice` (from 0) of a prompt: `seed` itself for the first, all different."""
    return (seed + choice + 2**63) % 2**64 - 2**63
