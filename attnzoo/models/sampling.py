"""How the next token is chosen from logits: options, what is reported, and what is refused."""

import math
from dataclasses import dataclass

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
    """How the next token is drawn; by default the most likely one. Raises ValueError naming the
    field for a value out of range."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_p, self.top_k)


def check_sampling(temperature: float, top_p: float, top_k: int) -> None:
    """Raises ValueError that names the field for options out of range."""
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


def choice_seed(seed: int, choice: int) -> int:
    """The seed of continuation `choice` (from 0) of a prompt: `seed` itself for the first, all different."""
    return (seed + choice + 2**63) % 2**64 - 2**63
