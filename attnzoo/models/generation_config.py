"""How a text is continued: length, choice of tokens, and where it ends."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from attnzoo.models.sampling import Sampling, check_type, greedy

LEAST_SEED, SEEDS = -(2**63), 2**64
"""Seeds are from LEAST_SEED to SEEDS - 1."""
MOST_CONTINUATIONS = 16384
"""Of one prompt, as in vLLM; servers allow fewer (max_choices)."""


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(Sampling):
    """Length, sampling and ends of continuations, in the words of transformers and vLLM.

    The fields of `Sampling`, and these. max_new_tokens: length in tokens at most, without the prompt; None: until the
    model's context is full. seed: the same seed gives the same text, alone or in a batch; None draws one from torch's
    global generator. stop: one string or several that end the text and are no part of it. logprobs: how many
    alternatives to report for each token; 0 reports the chosen token alone, None nothing. n: number of continuations of
    each prompt, at most MOST_CONTINUATIONS. ignore_eos: go on after tokens that end a text.

    >>> GenerationConfig(max_new_tokens=64, temperature=0.7, stop="\\n").stop
    ('\\n',)

    Raises ValueError that names the field for a value of another type or out of range, and for n > 1 at temperature 0.
    """

    max_new_tokens: int | None = 16
    seed: int | None = None
    stop: str | Sequence[str] = ()
    logprobs: int | None = None
    n: int = 1
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, optional in (
            ("max_new_tokens", True),
            ("seed", True),
            ("logprobs", True),
            ("n", False),
        ):
            check_type(name, getattr(self, name), int, "a whole number" + " or None" * optional, optional)
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(
                f"ignore_eos={self.ignore_eos!r} has type {type(self.ignore_eos).__name__}; it must be a bool"
            )
        super().__post_init__()
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.seed is not None and not LEAST_SEED <= self.seed < SEEDS:
            raise ValueError(f"seed={self.seed} must fit into 64 bits")
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs={self.logprobs} must be at least 0, or None for no log probabilities")
        if not 1 <= self.n <= MOST_CONTINUATIONS:
            raise ValueError(f"n={self.n} must be at least 1 and at most {MOST_CONTINUATIONS}")
        if self.n > 1 and greedy(self.temperature):
            raise ValueError(
                f"n={self.n} with temperature={self.temperature} would give the same text {self.n} times; set a "
                "temperature, 1.0 for example"
            )
        object.__setattr__(self, "stop", _stop_strings(self.stop))


FIELDS = tuple(field.name for field in fields(GenerationConfig))


def _stop_strings(stop: Any) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, list | tuple) or not all(isinstance(text, str) for text in strings):
        raise ValueError(f"stop={stop!r} must be a string or a list of strings")
    if "" in strings:
        raise ValueError(f"stop={stop!r} holds an empty string, which would end every text at once; leave it out")
    return tuple(strings)
