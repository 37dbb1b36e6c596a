"""Multi-query associative recall: pairs of key and value, then keys whose values are to be told.

Source: Arora et al. 2023, "Zoology" (arXiv 2312.04927), section 3.1: in text, what has been said once is looked up
many times and at uneven distances. Here `pairs` pairs stand at the start; each key is asked for once, near the pairs
more often than far from them (gaps by their power law, exponent 0.01 - 1); between questions stand random tokens.
Only the values asked for count.

Differs from the paper: one length and one number of pairs, a few hundred steps, one learning rate for all variants.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from attnzoo.evaluate.config import RecallConfig

POWER = 0.01
IGNORED = -100


def recall_batch(config: RecallConfig, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(tokens_BT, targets_BT). Keys are the lower half of the vocabulary, values the upper half.

    tokens: k1 v1 ... kn vn, then random tokens with the keys among them, in any order, at even distances from the end
    of the pairs. The target at such a key is its value; everywhere else -100.
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
    """Pairs at the start, key n again at 2 * gap n after the pairs, noise elsewhere; and the targets."""
    pairs = keys_BN.shape[1]
    tokens_BT, targets_BT = noise_BT.clone(), torch.full_like(noise_BT, IGNORED)
    tokens_BT[:, : 2 * pairs] = torch.stack([keys_BN, values_BN], dim=2).flatten(1)
    questions_BN = 2 * pairs + 2 * gaps_BN
    tokens_BT.scatter_(1, questions_BN, keys_BN)
    targets_BT.scatter_(1, questions_BN, values_BN)
    return tokens_BT, targets_BT


def recall_batches(config: RecallConfig, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless training batches."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield recall_batch(config, config.batch_size, generator)


def held_out(config: RecallConfig) -> tuple[Tensor, Tensor]:
    """The test sequences, the same for all variants and seeds."""
    return recall_batch(config, config.test_sequences, torch.Generator().manual_seed(2**31 - 1))


@torch.no_grad()
def recall_accuracy(model: torch.nn.Module, config: RecallConfig) -> float:
    """Share of the held-out questions whose value is the most likely token."""
    tokens_BT, targets_BT = held_out(config)
    asked_BT = targets_BT != IGNORED
    right = 0
    for tokens, targets, asked in zip(
        *(t.split(config.batch_size) for t in (tokens_BT, targets_BT, asked_BT)), strict=True
    ):
        right += int((model(tokens).argmax(-1) == targets)[asked].sum())
    return right / int(asked_BT.sum())
