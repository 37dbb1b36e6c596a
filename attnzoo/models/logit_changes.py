"""What changes the logits of one sequence before a token is chosen: biases, and penalties for tokens that it holds.

Sources: biases, presence and frequency penalties are those of OpenAI's interface; the repetition penalty is that of
Keskar et al. 2019, CTRL (arXiv 1909.05858), section 4.1, where negative logits are multiplied, not divided. They come
in vLLM's order, which tells for the repetition penalty: bars and biases, repetition, frequency and presence.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from attnzoo.models.sampling import Sampling


class LogitChanges:
    """The changes of one sequence, which counts its tokens as it grows.

    options: penalties and biases. prompt: token ids; negative ones stand for embeddings and are no tokens. Tokens from
    `vocab_size` on have no logit here and are not counted.
    """

    def __init__(self, options: Sampling, prompt: Sequence[int], vocab_size: int, device: torch.device) -> None:
        self._options, self._vocab_size = options, vocab_size
        self._counts_V = torch.zeros(vocab_size, device=device)
        self._seen_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        if options.repetition_penalty != 1.0:
            self._seen_V[self._known(prompt)] = True
        self._biased = list(options.logit_bias)
        self._biases = torch.tensor(list(options.logit_bias.values()), device=device)
        self._counted = 0

    @staticmethod
    def of(
        options: Sampling, prompt: Sequence[int], vocab_size: int, device: torch.device, *, bars: bool = False
    ) -> "LogitChanges | None":
        """None where the options change no logits. bars: whether tokens may be barred."""
        usual = not (options.presence_penalty or options.frequency_penalty or options.logit_bias or bars)
        if usual and options.repetition_penalty == 1.0:
            return None
        return LogitChanges(options, prompt, vocab_size, device)

    def apply(self, logits_V: Tensor, tokens: Sequence[int], barred: Sequence[int] = ()) -> Tensor:
        """The changed logits, float32. tokens: all that the sequence has generated, which only ever grow. barred: those
        that may not come now."""
        options, x_V = self._options, logits_V.float().clone()
        self._count(tokens)
        if self._biased:
            x_V[self._biased] += self._biases
        if barred:
            x_V[list(barred)] = -torch.inf
        if options.repetition_penalty != 1.0:
            penalised_V = torch.where(x_V > 0, x_V / options.repetition_penalty, x_V * options.repetition_penalty)
            x_V = torch.where(self._seen_V, penalised_V, x_V)
        if options.frequency_penalty or options.presence_penalty:
            x_V -= options.frequency_penalty * self._counts_V + options.presence_penalty * (self._counts_V > 0)
        return x_V

    def _count(self, tokens: Sequence[int]) -> None:
        new = self._known(tokens[self._counted :])
        self._counted = len(tokens)
        if new:
            index = torch.tensor(new, device=self._counts_V.device)
            self._counts_V.index_add_(0, index, torch.ones(len(new), device=index.device))
            self._seen_V[index] = True

    def _known(self, tokens: Sequence[int]) -> list[int]:
        return [token for token in tokens if 0 <= token < self._vocab_size]
