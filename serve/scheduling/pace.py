"""Limits the prompt tokens of a step while other sequences wait for their next token, from measured step times."""

FIRST = 64
"""Limit before the first measurement, in tokens."""
LEAST = 32
"""Smallest limit: fewer tokens cost a pass over the weights all the same. Steps with fewer are not measured."""
PASSES = 2
"""A step that decodes and reads prompts costs so many decode steps, plus the time of its prompt tokens."""
WEIGHT = 0.5
"""Weight of the newest measurement in the moving average."""


class PromptPace:
    """Estimates how many prompt tokens keep a step within about `target_s` seconds (None: no limit).

    The limit is a power of two, so that equal loads are cut into equal chunks.
    """

    def __init__(self, target_s: float | None) -> None:
        self.target_s = target_s
        self._decode_s = 0.0
        self._token_s: float | None = None

    @property
    def prompt_tokens(self) -> int | None:
        """Most prompt tokens of the next step; None: no limit."""
        if self.target_s is None:
            return None
        if self._token_s is None:
            return FIRST
        room = int((self.target_s - PASSES * self._decode_s) / self._token_s)
        return max(LEAST, 1 << max(room, 1).bit_length() - 1)

    def measured(self, decoding: int, prompt_tokens: int, seconds: float) -> None:
        """Records that a step took `seconds`. decoding: sequences that decoded in it; prompt_tokens: tokens it read."""
        if prompt_tokens == 0:
            self._decode_s = _mixed(self._decode_s or seconds, seconds)
        elif prompt_tokens >= LEAST:
            passes_s = (PASSES if decoding else PASSES - 1) * self._decode_s
            token_s = max(seconds - passes_s, 0.1 * seconds, 1e-9) / prompt_tokens
            self._token_s = _mixed(self._token_s or token_s, token_s)


def _mixed(before: float, now: float) -> float:
    return (1 - WEIGHT) * before + WEIGHT * now
