"""Log probabilities of the tokens of a prompt, noted while it is read."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attnzoo.models.row_sampling import row_logprobs
from attnzoo.models.sampling import NOT_FINITE, TokenLogprobs
from serve.faults import LogitsError

ROWS = 256
"""Tokens whose logits are computed at once: with a vocabulary of 49,152 some 50 MB, several times over."""


class PromptScores:
    """What is known of one prompt's tokens.

    prompt: token ids. alternatives: most likely tokens to report at each place. found: of each token, given those
    before it; None for the first, which nothing stands before, and for what is not read yet.
    """

    def __init__(self, prompt: Sequence[int], alternatives: int) -> None:
        self._prompt, self._alternatives = prompt, alternatives
        self.found: list[TokenLogprobs | None] = [None] * len(prompt)

    @staticmethod
    def of(prompt: Sequence[int], alternatives: int | None) -> "PromptScores | None":
        """None: log probabilities of the prompt are not wanted."""
        return None if alternatives is None else PromptScores(prompt, alternatives)

    def note(self, start: int, hidden_TD: Tensor, logits: Callable[[Tensor], Tensor]) -> None:
        """Notes what hidden vectors from token `start` on say of the tokens behind them. A part that is read once more
        is noted once more. Raises LogitsError where logits are not finite."""
        targets = self._prompt[start + 1 : start + 1 + len(hidden_TD)]
        for first in range(0, len(targets), ROWS):
            some = targets[first : first + ROWS]
            logits_TV = logits(hidden_TD[first : first + len(some)])
            if not bool(logits_TV.amax(-1).isfinite().all()):
                raise LogitsError(NOT_FINITE)
            given_T = torch.tensor(some, dtype=torch.long, device=logits_TV.device)
            most = min(self._alternatives, logits_TV.shape[-1])
            each = row_logprobs(logits_TV, given_T, most).tolist()
            for at, (token, numbers) in enumerate(zip(some, each, strict=True), start + 1 + first):
                ids, values = (int(number) for number in numbers[1 : 1 + most]), numbers[1 + most :]
                self.found[at] = TokenLogprobs(token, numbers[0], tuple(zip(ids, values, strict=True)))
