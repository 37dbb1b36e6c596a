"""The n-gram baseline: a probability distribution, right by hand, better with a longer context."""

import numpy as np
import pytest

from train.ngram import estimate_discounts, join, ngram_bits_per_byte, ngram_probabilities

TEXT = (b"the cat sat on the mat, the dog sat on the log; " * 30) + b"and then all of them went home. " * 10


@pytest.mark.parametrize("order", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("context", [b"the c", b"zzzzz", b"\0\0\0\0\0", b"n th"])
def test_probabilities_sum_to_one(order, context):
    """Of all 256 bytes after a context, seen or not."""
    total = sum(ngram_probabilities(TEXT, context + bytes([byte]), [order])[order][-1] for byte in range(256))
    assert abs(total - 1.0) < 1e-9


def test_unigram_by_hand():
    """aab: counts 2 and 1, discount 0.5 each (too little text to estimate), reserved mass 1/3 over 256 bytes."""
    probabilities = ngram_probabilities(b"aab", b"abc", [1])[1]
    reserved = 1.0 / 3.0 / 256
    np.testing.assert_allclose(probabilities, [1.5 / 3 + reserved, 0.5 / 3 + reserved, reserved])


def test_bigram_by_hand():
    """After a in "abac": b and c once each. The order below counts the distinct bytes before a, b and c."""
    lower = {ord("a"): 2, ord("b"): 1, ord("c"): 1}
    below = {byte: (count - 0.5 + 1.5 / 256) / 4 for byte, count in lower.items()}
    probability = ngram_probabilities(b"abac", b"ab", [2])[2][1]
    np.testing.assert_allclose(probability, (1 - 0.5) / 2 + (1.0 / 2) * below[ord("b")])


def test_lower_orders_count_distinct_neighbours():
    """In "xyxyxyz" y comes three times but only after x: in the order below it weighs as little as z does.

    The text is preceded by a zero, so x follows 0 and y (2), y follows x (1), z follows y (1).
    """
    below = (1 - 0.5 + 1.5 / 256) / 4
    unseen = ngram_probabilities(b"xyxyxyz", b"qy", [2])[2][1]  # q was never seen: the order below decides
    np.testing.assert_allclose(unseen, below)


def test_discounts_by_hand():
    """Chen and Goodman's estimates: 6 n-grams seen once, 4 twice, 3 three times, 2 four times: Y = 6 / (6 + 2 * 4)."""
    counts = np.array([1] * 6 + [2] * 4 + [3] * 3 + [4] * 2)
    y = 6 / 14
    wanted = [0.0, 1 - 2 * y * 4 / 6, 2 - 3 * y * 3 / 4, 3 - 4 * y * 2 / 3]
    np.testing.assert_allclose(estimate_discounts(counts), wanted)


def test_longer_contexts_predict_better_and_all_beat_a_uniform_guess():
    train, validation = TEXT[: len(TEXT) // 2], TEXT[len(TEXT) // 2 : -320]
    bits = ngram_bits_per_byte(train, validation, [1, 2, 3, 5])
    assert 8 > bits[1] > bits[2] > bits[3] > bits[5] > 0


def test_random_bytes_cost_eight_bits():
    random = np.random.default_rng(0)
    train, validation = (random.integers(0, 256, size, dtype=np.uint8).tobytes() for size in (200_000, 20_000))
    assert abs(ngram_bits_per_byte(train, validation, [1])[1] - 8) < 0.01


def test_documents_end_with_a_zero():
    assert join(["ab", "c"]) == b"ab\0c\0"


def test_refused():
    with pytest.raises(ValueError, match="order=9 must be between 1 and 8"):
        ngram_bits_per_byte(b"a", b"a", [9])
    with pytest.raises(ValueError, match="one of them is empty"):
        ngram_bits_per_byte(b"", b"a", [1])
