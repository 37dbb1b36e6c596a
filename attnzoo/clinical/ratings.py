"""Published ratings of case studies: who rated what how, and every pair of raters on what both rated."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from attnzoo.clinical.formats.tables import rows_of

KEY = ("case_study_id", "tag", "principle", "conversation_source")
"""What was rated: a section (tag) of a case, by a principle, in the text of one source."""

Key = tuple[str, ...]
Ratings = dict[str, dict[Key, float]]
"""By rater, then by what was rated."""


@dataclass(frozen=True)
class Pairs:
    """Ratings of two raters, row by row of the same text by the same principle. cases: the case of each row."""

    first: np.ndarray
    second: np.ndarray
    cases: np.ndarray

    def __len__(self) -> int:
        return len(self.first)


def read_ratings(path: Path, column: str = "rating") -> Ratings:
    """The ratings in a tsv file, also gzipped, with the columns of `KEY`, `rater` and `column`. What a rater rated
    twice has the mean of both. Raises ValueError that names the file and the row."""
    found: dict[str, dict[Key, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows_of(path, (*KEY, "rater", column), delimiter="\t"):
        found[row.fields["rater"]][tuple(row.fields[name] for name in KEY)].append(row.known(column))
    return {
        rater: {key: sum(values) / len(values) for key, values in each.items()} for rater, each in sorted(found.items())
    }


def pair(ratings: Ratings, first: str, second: str) -> Pairs:
    """What both raters rated. Raises ValueError for a rater who is not there, and where they have nothing in common."""
    for rater in (first, second):
        if rater not in ratings:
            raise ValueError(f"no ratings of {rater!r}; there are those of {', '.join(ratings)}")
    found = _joined(ratings[first], ratings[second])
    if not len(found):
        raise ValueError(f"{first!r} and {second!r} rated nothing in common")
    return found


def against(ratings: Ratings, others: Ratings) -> Pairs:
    """Each rater's ratings beside those that `others` have for the same rater: for example people's ratings, and what
    an automatic judge gave for each of them. Raises ValueError where they have no rater in common."""
    raters = [rater for rater in ratings if rater in others]
    if not raters:
        raise ValueError(f"no rater in common: {', '.join(ratings)}, and {', '.join(others)}")
    return pooled({(rater, rater): _joined(ratings[rater], others[rater]) for rater in raters})


def all_pairs(ratings: Ratings) -> dict[tuple[str, str], Pairs]:
    """Every two raters who rated something in common, by their names in alphabetical order."""
    return {
        (first, second): pair(ratings, first, second)
        for first, second in combinations(sorted(ratings), 2)
        if ratings[first].keys() & ratings[second].keys()
    }


def _joined(one: Mapping[Key, float], two: Mapping[Key, float]) -> Pairs:
    keys = sorted(one.keys() & two.keys())
    return Pairs(
        np.array([one[key] for key in keys]), np.array([two[key] for key in keys]), np.array([key[0] for key in keys])
    )


def pooled(pairs: Mapping[tuple[str, str], Pairs]) -> Pairs:
    """All pairs of all raters together."""
    parts = list(pairs.values())
    return Pairs(
        np.concatenate([each.first for each in parts]),
        np.concatenate([each.second for each in parts]),
        np.concatenate([each.cases for each in parts]),
    )
