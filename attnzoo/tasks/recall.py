"""Multi-query associative recall (MQAR): pairs of key and value, then keys whose values the model must predict.

Source: Arora et al. 2023, "Zoology" (arXiv 2312.04927), section 3.1. A sequence begins with `pairs` pairs. Each key
then occurs once more, at a distance drawn from the paper's power law (exponent 0.01 - 1), so that short distances are
more frequent. Random tokens fill the rest. Only the predicted values count for the loss.

Differs from the paper: one length and one number of pairs, a few hundred steps, one learning rate for all variants.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

POWER = 0.01
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class RecallTask:
    """vocab_size: half of the tokens are keys, half are values. length: tokens of a sequence; the first 2 * pairs are
    the pairs. Raises ValueError if the pairs and their queries do not fit.
    """

    vocab_size: int = 64
    pairs: int = 8
    length: int = 64

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise ValueError(f"recall.pairs={self.pairs} must be at least 1")
        if self.pairs > self.vocab_size // 2:
            raise ValueError(f"recall.pairs={self.pairs} is more than the recall.vocab_size={self.vocab_size} / 2 keys")
        if self.length < 4 * self.pairs:
            raise ValueError(
                f"recall.length={self.length} has no room for recall.pairs={self.pairs} pairs and as many queries "
                f"of two tokens each; use at least {4 * self.pairs}"
            )


def recall_batch(config: RecallTask, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(tokens_BT, targets_BT), int64. Keys are the lower half of the vocabulary, values the upper half.

    tokens: k1 v1 ... kn vn, then random tokens with each key once among them, in any order, an even number of tokens
    after the pairs. The target at such a key is its value; all other targets are -100.
    """
    half, pairs, length = config.vocab_size // 2, config.pairs, config.length
    keys_BN = torch.rand(batch, half, generator=generator).argsort(dim=1)[:, :pairs]
    values_BN = torch.randint(half, 2 * half, (batch, pairs), generator=generator)
    places = (length - 2 * pairs) // 2
    weights = torch.arange(1, places + 1, dtype=torch.float64) ** (POWER - 1)
    gaps_BN = torch.multinomial(weights.expand(batch, -1), pairs, generator=generator)
    noise_BT = torch.randint(2 * half, (batch, length), generator=generator)
    return place(keys_BN, values_BN, gaps_BN, noise_BT)


def place(keys_BN: Tensor, values_BN: Tensor, gaps_BN: Tensor, noise_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens_BT, targets_BT): the pairs first, key n again at 2 * gaps_BN[:, n] after the pairs, noise elsewhere."""
    pairs = keys_BN.shape[1]
    tokens_BT, targets_BT = noise_BT.clone(), torch.full_like(noise_BT, IGNORED)
    tokens_BT[:, : 2 * pairs] = torch.stack([keys_BN, values_BN], dim=2).flatten(1)
    questions_BN = 2 * pairs + 2 * gaps_BN
    tokens_BT.scatter_(1, questions_BN, keys_BN)
    targets_BT.scatter_(1, questions_BN, values_BN)
    return tokens_BT, targets_BT
