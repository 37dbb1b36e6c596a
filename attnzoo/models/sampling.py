"""How the next token is chosen from logits: options, what is reported, and what is refused."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

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
    """How likely a token was under the model, before penalties, biases, temperature, top_k, top_p and min_p.

    logprob: natural logarithm of its probability. top: (token, logprob) of the most likely tokens, best first. offset:
    characters of the text before the token.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    offset: int = 0


MOST_PENALTY, MOST_REPETITION, MOST_BIAS = 2.0, 100.0, 100.0
"""Bounds of penalties and biases; beyond these of presence and frequency OpenAI's interface takes none."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; by default the most likely one.

    temperature: 0 takes the most likely token. top_k: draw from this many most likely tokens, 0 is off. top_p: draw
    from the smallest set of tokens with this probability, 1.0 is off. min_p: leave out tokens that are less likely than
    this share of the most likely one, 0 is off. presence_penalty: taken from the logits of tokens that the continuation
    holds; frequency_penalty: the same for each time it holds them; repetition_penalty: divides the logits of tokens in
    the prompt or the continuation (multiplies negative ones), 1.0 is off. logit_bias: by token id, added to its logit.

    Raises ValueError that names the field for a value of another type or out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_type("top_k", self.top_k, int, "a whole number")
        for name in NUMBERS:
            check_type(name, getattr(self, name), int | float, "a number")
        # Comparisons with NaN are false; isfinite fails for integers that no float can hold.
        finite = isinstance(self.temperature, int) or math.isfinite(self.temperature)
        if not (self.temperature >= 0 and finite):
            raise ValueError(f"temperature={self.temperature} must be a number, 0 (greedy) or positive")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be 0 (off) or at least 1")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p} must be greater than 0 and at most 1")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p={self.min_p} must be between 0 (off) and 1")
        for name in ("presence_penalty", "frequency_penalty"):
            if not abs(getattr(self, name)) <= MOST_PENALTY:
                raise ValueError(f"{name}={getattr(self, name)} must be between -{MOST_PENALTY:g} and {MOST_PENALTY:g}")
        if not 0.0 < self.repetition_penalty <= MOST_REPETITION:
            bounds = f"above 0 and at most {MOST_REPETITION:g}; 1 is off"
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be {bounds}")
        check_bias(self.logit_bias)


NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


def check_type(name: str, value: Any, kind: Any, what: str, optional: bool = False) -> None:
    """Raises ValueError unless the value is of this kind, which a bool never is."""
    if (value is None and optional) or (isinstance(value, kind) and not isinstance(value, bool)):
        return
    raise ValueError(f"{name}={value!r} has type {type(value).__name__}; it must be {what}")


def check_bias(bias: Any) -> None:
    """Raises ValueError unless `logit_bias` maps token ids to numbers in bounds."""
    if not isinstance(bias, Mapping):
        raise ValueError(f"logit_bias={bias!r} has type {type(bias).__name__}; it must map token ids to numbers")
    for token, value in bias.items():
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise ValueError(f"logit_bias has the key {token!r}; keys are token ids, whole numbers from 0 on")
        check_type(f"logit_bias[{token}]", value, int | float, "a number")
        if not abs(value) <= MOST_BIAS:
            raise ValueError(f"logit_bias[{token}]={value} must be between -{MOST_BIAS:g} and {MOST_BIAS:g}")


class TokenIdError(ValueError):
    """An option has a token that the vocabulary does not have. param: the option."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


def check_known(name: str, tokens: Iterable[int], vocab_size: int) -> None:
    """Raises TokenIdError where one of an option's tokens is outside the vocabulary."""
    unknown = next((token for token in tokens if token >= vocab_size), None)
    if unknown is not None:
        raise TokenIdError(name, f"{name} has token {unknown}, which is outside the vocabulary of {vocab_size}")


def greedy(temperature: float) -> bool:
    """Whether this temperature takes the most likely token."""
    return temperature < GREEDY_BELOW


def choice_seed(seed: int, choice: int) -> int:
    """The seed of continuation `choice` (from 0) of a prompt: `seed` itself for the first, all different."""
    return (seed + choice + 2**63) % 2**64 - 2**63
