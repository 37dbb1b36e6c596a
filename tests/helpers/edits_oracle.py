"""Attention with edits in plain sums of float64, by the words of the language: it shares no code with the engines.

It reads the fields of reads and edits and nothing else of `attnzoo.attention.edits`: which positions words mean, which
steps, and every formula are written here a second time.
"""

import math

import numpy as np

from attnzoo.attention.edits import (
    Add,
    After,
    CopyHead,
    Except,
    Hide,
    Move,
    PutScores,
    PutWeights,
    Raise,
    Scale,
    Sinks,
    Span,
    Temper,
)

SCORE_EDITS = (Add, Hide, Temper, PutScores)
WEIGHT_EDITS = (Scale, Raise, PutWeights, CopyHead, Move)


def numbers(words, size):
    """Layers or heads."""
    if words == "all":
        return set(range(size))
    found = set()
    for item in [words] if isinstance(words, int | str) else words:
        if isinstance(item, int):
            found.add(item % size)
        else:
            first, _, last = item.partition(":")
            found |= set(range(size)[slice(int(first) if first else None, int(last) if last else None)])
    return found


def positions(words, layout, total, sinks):
    """The set of positions; sinks: sets of positions by `Sinks`."""
    everything = set(range(total))
    if isinstance(words, tuple):
        return set().union(*(positions(each, layout, total, sinks) for each in words))
    if isinstance(words, Except):
        return everything - positions(words.of, layout, total, sinks)
    if isinstance(words, Sinks):
        return set(sinks[words])
    if isinstance(words, After):
        return {p for p in everything if p > max(positions(words.name, layout, total, sinks))}
    if isinstance(words, int):
        return {words if words >= 0 else layout.prompt + words}
    if isinstance(words, Span):
        start = words.start if words.start >= 0 else layout.prompt + words.start
        stop = {None: start + 1, "end": layout.prompt}.get(words.stop, words.stop)
        return set(range(start, stop if stop >= 0 else layout.prompt + stop))
    if words == "all":
        return everything
    if words == "generated":
        return {p for p in everything if p >= layout.prompt}
    given = layout.spans[words]
    pieces = [given] if isinstance(given[0], int) else given
    return {p for start, stop in pieces for p in range(start, stop)}


def step_of(position, layout):
    return 0 if position < layout.prompt else position - layout.prompt + 1


def in_steps(words, position, layout):
    if words == "all":
        return True
    step = step_of(position, layout)
    for item in [words] if isinstance(words, int | str) else words:
        if isinstance(item, int):
            if item == step:
                return True
        else:
            first, _, last = item.partition(":")
            if int(first or 0) <= step and (not last or step < int(last)):
                return True
    return False


class Oracle:
    """One layer's attention of one sequence.

    scores, visible [N][T][S]; values [N][S][H]; queries [T] and keys [N][S]: positions, -1 for none.
    """

    def __init__(self, items, layout, total, *, layer=0, layers=1, sinks=None):
        self.items, self.layout, self.total, self.sinks = items, layout, total, sinks or {}
        self.layer, self.layers = layer, layers

    def run(self, scores, visible, values, queries, keys):
        """(out_NTH, weights_NTS, scores_NTS after score edits)."""
        heads, tokens = scores.shape[:2]
        scores = np.where(visible, scores.astype(np.float64), -math.inf)
        for item in self.items:
            if isinstance(item, SCORE_EDITS) and self.here(item):
                self.edit_scores(item, scores, queries, keys)
                scores[~visible] = -math.inf
        weights = np.zeros_like(scores)
        for n in range(heads):
            for t in range(tokens):
                row = scores[n, t]
                if (row > -math.inf).any():
                    exponentials = np.exp(row - row.max())
                    weights[n, t] = exponentials / exponentials.sum()
        for item in self.items:
            if isinstance(item, WEIGHT_EDITS) and self.here(item):
                self.edit_weights(item, weights, visible, queries, keys)
                weights[~visible] = 0.0
        return np.einsum("nts,nsh->nth", weights, values.astype(np.float64)), weights, scores

    def here(self, item):
        return self.layer in numbers(item.where.layers, self.layers)

    def rows(self, item, heads, queries):
        """(n, t) that the item names, and their places among the named heads and queries."""
        named = sorted(numbers(item.where.heads, heads))
        at = positions(item.where.queries, self.layout, self.total, self.sinks)
        at = sorted(p for p in at if in_steps(item.where.steps, p, self.layout))
        for n in named:
            for t, position in enumerate(queries):
                if position in at:
                    yield n, t, named.index(n), at.index(position)

    def keys_of(self, words):
        return positions(words, self.layout, self.total, self.sinks)

    def edit_scores(self, item, scores, queries, keys):
        columns = sorted(self.keys_of(item.where.keys))
        for n, t, head, query in self.rows(item, len(scores), queries):
            for s, key in enumerate(keys[n]):
                if key not in columns:
                    continue
                old = scores[n, t, s]
                if isinstance(item, Hide):
                    scores[n, t, s] = -math.inf
                elif isinstance(item, PutScores):
                    put = item.scores.values.numpy()
                    scores[n, t, s] = put[head if len(put) > 1 else 0, query, columns.index(key)]
                elif old > -math.inf:
                    if isinstance(item, Add):
                        scores[n, t, s] = old + item.value
                    elif item.magnitude:
                        scores[n, t, s] = old + (item.factor - 1) * abs(old)
                    else:
                        scores[n, t, s] = old * item.factor

    def edit_weights(self, item, weights, visible, queries, keys):
        before = weights.copy()
        columns = sorted(self.keys_of(item.where.keys))
        for n, t, head, query in self.rows(item, len(weights), queries):
            row, old = weights[n, t], before[n, t]
            inside = [s for s, key in enumerate(keys[n]) if key in columns and visible[n, t, s]]
            if isinstance(item, Scale):
                row[inside] *= item.factor
                self.restore(row, old, item.renormalise)
            elif isinstance(item, Raise):
                share = old[inside].sum() / old.sum() if old.sum() else 0.0
                if 0 < share < item.share:
                    row[inside] *= item.share / share
                    self.restore(row, old, True)
            elif isinstance(item, PutWeights):
                put = item.weights.values.numpy()
                for s in inside:
                    row[s] = put[head if len(put) > 1 else 0, query, columns.index(keys[n][s])]
                self.restore(row, old, item.renormalise)
            elif isinstance(item, CopyHead):
                source = {key: before[item.source, t, s] for s, key in enumerate(keys[item.source]) if key >= 0}
                for s in inside:
                    row[s] = source.get(keys[n][s], 0.0)
            else:
                self.move(item, row, keys[n], inside)

    @staticmethod
    def restore(row, old, wanted):
        if wanted and row.sum():
            row *= old.sum() / row.sum()

    def move(self, item, row, keys, giving):
        to = self.keys_of(item.to)
        receiving = [s for s, key in enumerate(keys) if key in to and s not in giving]
        received = row[receiving].sum()
        if received <= 0:
            return
        if item.only_heads is not None:
            of = self.keys_of(item.only_heads.of)
            seen = [s for s, key in enumerate(keys) if key in of]
            mass = row[seen].sum()
            rest = row[[s for s in seen if s in receiving]].sum()
            if mass < item.only_heads.min_mass or rest < item.only_heads.min_share * mass:
                return
        moved = item.share * row[giving].sum()
        row[giving] *= 1 - item.share
        row[receiving] *= 1 + moved / received
