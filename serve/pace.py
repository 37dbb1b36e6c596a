"""How much prompt a step may read while others wait for their next token: measured, handed over as an integer."""

FIRST = 64
"""Tokens until something was measured."""
LEAST = 32
"""Tokens that are always read: fewer cost a pass over the weights all the same. Smaller steps are not measured."""
PASSES = 2
"""Passes over the weights, each at the price of a step that only decodes, before the first token of a prompt."""
WEIGHT = 0.5
"""Of the newest measurement."""


class PromptPace:
    """Prompt tokens that keep a step within about `target_s`, None: no bound.

    The answer is a power of two, so that one and the same load is cut into the same chunks.
    """

    def __init__(self, target_s: float | None) -> None:
        self.target_s = target_s
        self._decode_s = 0.0
        self._token_s: float | None = None

    @property
    def prompt_tokens(self) -> int | None:
        """For the next step."""
        if self.target_s is None:
            return None
        if self._token_s is None:
            return FIRST
        room = int((self.target_s - PASSES * self._decode_s) / self._token_s)
        return max(LEAST, 1 << max(room, 1).bit_length() - 1)

    def measured(self, decoding: int, prompt_tokens: int, seconds: float) -> None:
        """A step of so many sequences that decode and tokens of prompts took `seconds`."""
        if prompt_tokens == 0:
            self._decode_s = _mixed(self._decode_s or seconds, seconds)
        elif prompt_tokens >= LEAST:
            passes_s = (PASSES if decoding else PASSES - 1) * self._decode_s
            token_s = max(seconds - passes_s, 0.1 * seconds, 1e-9) / prompt_tokens
            self._token_s = _mixed(self._token_s or token_s, token_s)


def _mixed(before: float, now: float) -> float:
    return (1 - WEIGHT) * before + WEIGHT * now
