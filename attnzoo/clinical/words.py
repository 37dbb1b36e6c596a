"""Words of texts: a vocabulary of those that training rows hold, and vectors of words to begin training with.

Letters: N texts, L tokens, W words of the vocabulary, D dimensions.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

UNKNOWN = "<unknown>"
TOKEN = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?|\d|[^\w\s]|_")
"""A word with its apostrophe, a digit, or a mark of punctuation."""


@dataclass(frozen=True)
class Vocabulary:
    """Lower-case words by id; id 0 stands for all words that are not in it. Raises ValueError."""

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.words or self.words[0] != UNKNOWN:
            raise ValueError(f"words begins with {self.words[:1]}; it must begin with {UNKNOWN!r}")
        if len(set(self.words)) < len(self.words):
            raise ValueError(f"words holds {Counter(self.words).most_common(1)[0][0]!r} twice; keep one of them")

    @classmethod
    def fit(cls, texts: Iterable[str], *, least: int = 2, also: Iterable[str] = ()) -> "Vocabulary":
        """The words that stand in at least `least` of the texts, and all words of `also`, whatever their number."""
        found = Counter(word for text in texts for word in set(tokens(text)))
        kept = {word for word, number in found.items() if number >= least}
        return cls((UNKNOWN, *sorted(kept | {word for text in also for word in tokens(text)})))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Vocabulary":
        """Reads what `to_dict` wrote. Raises ValueError."""
        words = values.get("words")
        if set(values) != {"words"} or not isinstance(words, list) or not all(isinstance(w, str) for w in words):
            raise ValueError("a vocabulary is a mapping with words, a list of strings")
        return cls(tuple(words))

    def to_dict(self) -> dict[str, Any]:
        """A mapping that JSON can hold."""
        return {"words": list(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}

    def encode(self, text: str) -> list[int]:
        """An id for each token."""
        return [self._ids.get(word, 0) for word in tokens(text)]

    def knows(self, word: str) -> bool:
        """Whether a word, in any case, has an id of its own."""
        return self._ids.get(word.lower(), 0) > 0

    def inputs(self, texts: Sequence[str], longest: int) -> tuple[Tensor, Tensor]:
        """(words_NL, lengths_N) of the first `longest` tokens of each text, as an `Ldam` takes them."""
        ids = [self.encode(text)[:longest] for text in texts]
        words_NL = torch.zeros(len(ids), max((len(row) for row in ids), default=0), dtype=torch.int64)
        for row, given in zip(words_NL, ids, strict=True):
            row[: len(given)] = torch.tensor(given, dtype=torch.int64)
        return words_NL, torch.tensor([len(row) for row in ids], dtype=torch.int64)


def tokens(text: str) -> list[str]:
    """The tokens of a text in lower case."""
    return [text[start:end].lower() for start, end in spans(text)]


def spans(text: str) -> list[tuple[int, int]]:
    """Where each token begins and ends, in characters."""
    return [match.span() for match in TOKEN.finditer(text)]


def cooccurrence_vectors(texts: Sequence[Sequence[int]], words: int, dim: int, *, window: int = 5) -> Tensor:
    """Vectors [W, D] of words that stand near the same words, of texts as token ids.

    Positive pointwise mutual information of words at most `window` apart, with probabilities of neighbours raised to
    .75, reduced to D dimensions by a singular value decomposition (Levy, Goldberg and Dagan, TACL 2015). Their mean
    square is 1; those of words without a neighbour are zeros.
    """
    counts = torch.zeros(words, words, dtype=torch.float64)
    for text in texts:
        ids = torch.as_tensor(text, dtype=torch.int64)
        for apart in range(1, min(window, len(ids) - 1) + 1):
            pair = (ids[:-apart], ids[apart:])
            one = torch.ones(len(pair[0]), dtype=torch.float64)
            counts.index_put_(pair, one, accumulate=True)
            counts.index_put_(pair[::-1], one, accumulate=True)
    of_word, of_neighbour = counts.sum(1, keepdim=True), counts.sum(0, keepdim=True) ** 0.75
    expected = of_word * (of_neighbour / of_neighbour.sum())
    information = (counts / expected).log().clamp(min=0.0).nan_to_num(0.0).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the decomposition draws a subspace to begin with
        u_WD, s_D, _ = torch.svd_lowrank(information, q=min(dim, words), niter=4)
    vectors_WD = torch.nn.functional.pad(u_WD * s_D.sqrt(), (0, dim - u_WD.shape[1]))
    scale = vectors_WD.square().mean().sqrt()
    return vectors_WD / max(float(scale), 1e-12)
