"""What is known about predictions from texts and told beside each of them: how frequent every label is, how many words
a text must have that the model knows, and whether explanations point at what the model uses.

Frequencies are those of training rows, the rest of inner validation rows: the vocabulary was made of the training
texts, so that these have more known words than other texts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from attnzoo.clinical import checks
from attnzoo.clinical.evidence import MapVerdict, read_shares, read_verdicts
from attnzoo.clinical.words import Vocabulary, spans
from attnzoo.report import counted
from attnzoo.types import checked

FEWEST = 0.01
"""The share of texts that have fewer known words, or a smaller share of them, than is asked for."""


@dataclass(frozen=True, kw_only=True)
class WordCount:
    """Words of the part of a text that is read: without digits and marks of punctuation, which every text has. known:
    of these in the vocabulary."""

    words: int
    known: int

    @property
    def share(self) -> float:
        """Known words of all; 0 without any word."""
        return self.known / max(self.words, 1)

    @classmethod
    def of(cls, text: str, vocabulary: Vocabulary, longest: int) -> "WordCount":
        """Of the first `longest` tokens."""
        read = [text[start:end] for start, end in spans(text)[:longest]]
        is_known = [vocabulary.knows(word) for word in read if word[0].isalpha()]
        return cls(words=len(is_known), known=sum(is_known))


@dataclass(frozen=True, kw_only=True)
class TextEvidence:
    """stays: in the training part. shares: of them with each label. texts: of the inner validation part. least_known,
    least_share: known words of a text, and their share of its words, that 99 % of these texts reach. maps: what is
    known about explanations, by the map's name."""

    stays: int
    shares: tuple[float, ...]
    texts: int
    least_known: int
    least_share: float
    maps: Mapping[str, MapVerdict]

    def reasons(self, found: WordCount) -> list[str]:
        """Why a text is not enough; empty where it is."""
        others = f"of {counted(self.texts, 'text')} that it had not seen in training 99 % had"
        if found.known < self.least_known:
            are = "is" if found.known == 1 else "are"
            return [f"{found.known} of the text's words {are} known to the model; {others} {self.least_known} or more"]
        if found.share < self.least_share:
            few = f"{found.share:.0%} of the text's words are known to the model"
            return [f"{few}; {others} {self.least_share:.0%} or more"]
        return []

    def to_dict(self) -> dict[str, Any]:
        """A mapping that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "TextEvidence":
        """What `to_dict` wrote. Raises ValueError, KeyError or TypeError for other content."""
        if set(content) != {one.name for one in fields(cls)}:
            raise ValueError(f"evidence has the keys {', '.join(map(str, content)) or 'none'}")
        return cls(
            shares=read_shares(content["shares"]),
            maps=read_verdicts(content["maps"]),
            **{name: checks.count(content[name], f"evidence.{name}", 0) for name in ("stays", "texts", "least_known")},
            least_share=checked(content["least_share"], float, "evidence.least_share"),
        )


def measure_texts(
    labels_NK: np.ndarray, texts: Sequence[str], vocabulary: Vocabulary, longest: int, maps: Mapping[str, MapVerdict]
) -> TextEvidence:
    """The evidence. labels_NK: of the training rows; texts: of the inner validation rows. maps: as
    `attnzoo.clinical.explain_words.judge_word_maps` gives them."""
    counts = [WordCount.of(text, vocabulary, longest) for text in texts]
    known_N, share_N = np.array([one.known for one in counts]), np.array([one.share for one in counts])
    return TextEvidence(
        stays=len(labels_NK),
        shares=tuple(float(share) for share in labels_NK.mean(axis=0, dtype=np.float64)),
        texts=len(counts),
        least_known=int(np.quantile(known_N, FEWEST, method="lower")),
        least_share=float(np.quantile(share_N, FEWEST, method="lower")),
        maps=maps,
    )
