"""Interpolated Kneser-Ney n-gram models over bytes, a baseline for language models.

Order n predicts a byte from the n-1 bytes before it. Modified Kneser-Ney smoothing with three discounts per order
(Chen and Goodman 1999, "An empirical study of smoothing techniques", eq. 24-26): the highest order discounts counts,
lower orders discount the numbers of distinct bytes that a sequence was seen after, and the lowest falls back to 1/256.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

HIGHEST_ORDER = 8
"""An n-gram of bytes is stored as one 64-bit integer."""


@dataclass
class Table:
    """Counts of one order. grams: sorted n-grams; contexts: their distinct first n-1 bytes, sorted; totals: sum of the
    counts of each context; reserved: sum of its discounts."""

    grams: np.ndarray
    counts: np.ndarray
    discounts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    reserved: np.ndarray

    @classmethod
    def of(cls, grams: np.ndarray, counts: np.ndarray) -> "Table":
        discounts = estimate_discounts(counts)[np.minimum(counts, 3)]
        contexts, starts = np.unique(grams >> np.uint64(8), return_index=True)
        totals = np.add.reduceat(counts, starts)
        return cls(grams, counts, discounts, contexts, totals, np.add.reduceat(discounts, starts))

    def interpolate(self, wanted: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """P(last byte | the bytes before) of each wanted n-gram, given the probabilities of the next lower order."""
        gram, seen = _find(self.grams, wanted)
        context, known = _find(self.contexts, wanted >> np.uint64(8))
        kept = np.where(seen, self.counts[gram] - self.discounts[gram], 0.0)
        interpolated: np.ndarray = (kept + self.reserved[context] * lower) / self.totals[context]
        return np.where(known, interpolated, lower)


def _find(table: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index, whether it is there) of each wanted key in a sorted table."""
    index = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return index, table[index] == wanted


def estimate_discounts(counts: np.ndarray) -> np.ndarray:
    """[0, D1, D2, D3+] from the numbers of n-grams seen once to four times."""
    seen = [float(np.count_nonzero(counts == times)) for times in range(1, 5)]
    if min(seen) == 0.0:  # the text is too short for the estimate
        return np.array([0.0, 0.5, 0.5, 0.5])
    ratio = seen[0] / (seen[0] + 2 * seen[1])
    estimates = [times - (times + 1) * ratio * seen[times] / seen[times - 1] for times in (1, 2, 3)]
    return np.array([0.0, *np.clip(estimates, 0.0, [1.0, 2.0, 3.0])])


def _grams(text: bytes, order: int) -> np.ndarray:
    """The n-gram that ends at each byte, as an integer; the text is padded with zero bytes in front."""
    padded = np.frombuffer(bytes(order - 1) + text, dtype=np.uint8)
    keys = np.zeros(len(text), dtype=np.uint64)
    for offset in range(order):
        keys = (keys << np.uint64(8)) | padded[offset : offset + len(text)]
    return keys


def join(documents: Iterable[str]) -> bytes:
    """All documents as bytes, each ended by a zero byte, which the models must predict too."""
    return b"".join(document.encode() + b"\0" for document in documents)


def ngram_bits_per_byte(train: bytes, validation: bytes, orders: Sequence[int]) -> dict[int, float]:
    """Bits per byte of `validation` under a model of each order, trained on `train`.

    Raises ValueError for an order outside 1..8 or an empty text.
    """
    probabilities = ngram_probabilities(train, validation, orders)
    return {order: float(-np.log2(p).mean()) for order, p in probabilities.items()}


def ngram_probabilities(train: bytes, text: bytes, orders: Sequence[int]) -> dict[int, np.ndarray]:
    """The probability of every byte of `text` given those before it, by order. Raises as `ngram_bits_per_byte`."""
    for order in orders:
        if not 1 <= order <= HIGHEST_ORDER:
            raise ValueError(f"order={order} must be between 1 and {HIGHEST_ORDER}")
    if not train or not text:
        raise ValueError("an n-gram model needs text to train on and text to predict; one of them is empty")
    found = {}
    lower = np.full(len(text), 1 / 256)
    for order in range(1, max(orders) + 1):
        wanted = _grams(text, order)
        grams, counts = np.unique(_grams(train, order), return_counts=True)
        if order in orders:
            found[order] = Table.of(grams, counts).interpolate(wanted, lower)
        if order < max(orders):
            # A lower order counts, for each n-gram, the distinct bytes that precede it.
            longer = np.unique(_grams(train, order + 1))
            after = longer & np.uint64(math.prod([256] * order) - 1)
            lower = Table.of(*np.unique(after, return_counts=True)).interpolate(wanted, lower)
    return found
