"""Sampling by the numbers."""

import math

import pytest
import torch

from attnzoo.models.sampling import filter_logits, sample

PROBABILITIES = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
LOGITS = PROBABILITIES.log()


def kept(top_k: int, top_p: float) -> list[int]:
    return torch.isfinite(filter_logits(LOGITS, top_k, top_p))[0].nonzero()[:, 0].tolist()


def test_filter():
    assert kept(0, 1.0) == [0, 1, 2, 3]
    assert kept(2, 1.0) == [1, 3]
    assert kept(9, 1.0) == [0, 1, 2, 3]
    assert kept(0, 0.35) == [1]
    assert kept(0, 0.65) == [1, 3]
    assert kept(0, 0.75) == [1, 2, 3]
    assert kept(0, 1e-9) == [1]
    assert kept(2, 0.6) == [1, 3]  # of the two that are left, the first has 4/7 of the mass


def test_frequencies_follow_the_temperature():
    generator = torch.Generator().manual_seed(0)
    drawn = sample(LOGITS.expand(40_000, -1), 0.5, 1.0, 0, generator)
    expected = PROBABILITIES[0] ** 2 / (PROBABILITIES[0] ** 2).sum()
    frequencies = torch.bincount(drawn, minlength=4) / 40_000
    assert (frequencies - expected).abs().max() < 4 * math.sqrt(0.25 / 40_000)


def test_greedy_takes_the_largest():
    assert sample(LOGITS, 0.0, 1.0, 0).tolist() == [1]


def test_refused():
    with pytest.raises(ValueError, match="temperature=-1"):
        sample(LOGITS, -1.0, 1.0, 0)
    with pytest.raises(ValueError, match=r"top_p=0.0"):
        filter_logits(LOGITS, 0, 0.0)
    with pytest.raises(ValueError, match="top_k=-1"):
        filter_logits(LOGITS, -1, 1.0)
