"""Log probabilities of given tokens, by a model's parallel form."""

from collections.abc import Sequence

import torch
from torch import Tensor

from attnzoo.models.decoder_lm import DecoderLM
from attnzoo.models.sampling import NOT_FINITE

LOGITS_BYTES = 256 << 20
"""Bytes of float32 logits that are computed at once."""


@torch.no_grad()
def score(model: DecoderLM, texts: Sequence[Sequence[int]], vocab_size: int | None = None) -> list[list[float]]:
    """Natural logarithm of the probability of every token but the first of each text, given those before it.

    vocab_size: only tokens below it count as possible; None: all of the model's. Raises ValueError where logits are not
    finite.
    """
    device, size = model.embedding.weight.device, vocab_size or model.config.vocab_size
    longest = max(map(len, texts))
    # Padding stands on the right, where a causal model cannot see it.
    padded = [[*text, *[0] * (longest - len(text))] for text in texts]
    hidden_BTD = model.hidden(torch.tensor(padded, device=device))
    return [_score(model, hidden_TD, text, size) for hidden_TD, text in zip(hidden_BTD, texts, strict=True)]


def _score(model: DecoderLM, hidden_TD: Tensor, text: Sequence[int], size: int) -> list[float]:
    values: list[float] = []
    targets_T = torch.tensor(list(text[1:]), device=hidden_TD.device, dtype=torch.long)
    rows = max(1, LOGITS_BYTES // (4 * model.config.vocab_size))
    for first in range(0, len(targets_T), rows):
        part = slice(first, min(first + rows, len(targets_T)))
        logits_TV = model.logits(hidden_TD[part])[:, :size].float()
        if not bool(logits_TV.amax(-1).isfinite().all()):
            raise ValueError(NOT_FINITE)
        values += logits_TV.log_softmax(-1).gather(-1, targets_T[part, None])[:, 0].tolist()
    return values
