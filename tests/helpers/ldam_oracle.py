"""LDAM once more, one stay at a time, in numpy and loops: what the operation and `attnzoo.models.Ldam` are held to."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray
Weights = Mapping[str, Array]
Read = Callable[[Sequence[int]], Array]
"""The vectors of a text's tokens."""


def label_weights(tokens: Array, labels: Array, kernel: Array, bias: Array) -> tuple[Array, Array, Array]:
    """G, u and beta of tokens that all exist."""
    count, width = len(tokens), kernel.shape[1]
    g, u = np.zeros((count, len(labels))), np.zeros((count, len(labels)))
    for t in range(count):
        for k in range(len(labels)):
            g[t, k] = sum(a * b for a, b in zip(tokens[t], labels[k], strict=True)) / math.sqrt(tokens.shape[1])
    for t in range(count):
        for k in range(len(labels)):
            total = bias[k]
            for w in range(width):
                source = t + w - (width - 1) // 2
                if 0 <= source < count:
                    total += kernel[k, w] * g[source, k]
            u[t, k] = max(total, 0.0)
    raised = np.array([math.exp(max(row)) for row in u])
    return g, u, raised / raised.sum() if count else raised


def layer_norm(w: Weights, name: str, x: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def gru(w: Weights, name: str, rows: Array) -> tuple[Array, Array]:
    """(outputs, last states) of both directions side by side."""
    sides, lasts = [], []
    for suffix, order in (("", range(len(rows))), ("_reverse", range(len(rows) - 1, -1, -1))):
        hidden = w[f"{name}.weight_hh_l0"].shape[1]
        h, found = np.zeros(hidden), np.zeros((len(rows), hidden))
        for t in order:
            of_x = w[f"{name}.weight_ih_l0{suffix}"] @ rows[t] + w[f"{name}.bias_ih_l0{suffix}"]
            of_h = w[f"{name}.weight_hh_l0{suffix}"] @ h + w[f"{name}.bias_hh_l0{suffix}"]
            (xr, xz, xn), (hr, hz, hn) = np.split(of_x, 3), np.split(of_h, 3)
            reset, update = 1 / (1 + np.exp(-xr - hr)), 1 / (1 + np.exp(-xz - hz))
            h = (1 - update) * np.tanh(xn + reset * hn) + update * h
            found[t] = h
        sides.append(found)
        lasts.append(h)
    return np.concatenate(sides, 1), np.concatenate(lasts)


def weigh(w: Weights, name: str, tokens: Array, labels: Array | None) -> tuple[Array, Array, Array]:
    project = w[f"{name}.project.weight"]
    of_labels = w[f"{name}.vector"] if labels is None else labels @ project.T
    return label_weights(tokens @ project.T, of_labels, w[f"{name}.kernel"], w[f"{name}.bias"])


def linear(w: Weights, name: str, x: Array) -> Array:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def definitions(config: Any, read: Read) -> Array | None:
    if config.labels == "none":
        return None
    return np.stack([read(ids).mean(0) for ids in config.definitions])


def logits(config: Any, w: Weights, read: Read, words: Sequence[int], cells: Array, variables: Sequence[int]) -> Array:
    """Of one stay: its real words, the cells [hours, variables, channels] of its real hours, which variables it has."""
    labels, parts = definitions(config, read), []
    if len(words):
        v = read(words)
        _, u, beta = weigh(w, "words", v, labels)
        parts.append(np.stack([text(config, w, v, u, beta, k) for k in range(len(config.definitions))]))
    if len(cells):
        d = np.stack([read(ids).mean(0) for ids in config.variables])
        if list(variables) == list(range(len(d))):
            beta = weigh(w, "variables", d, labels)[2]
        else:  # the neighbours of a variable that is gone see zeros in its place, as at the ends
            beta = gapped(w, d, labels, variables)
        z = np.zeros(config.model_dim)
        for i in variables:
            h = gru(w, "series.second", gru(w, "series.first", cells[:, i])[0])[1]
            h = h + d[i] if config.describe_series else h
            z = z + layer_norm(w, "series_norm", beta[i] * h + h)
        parts.append(z)
    fused = np.zeros((len(config.definitions), config.model_dim)) + (sum(parts) / len(parts) if parts else 0.0)
    found = np.array([linear(w, "head", z)[k] for k, z in enumerate(fused)])
    return found + 10 * tf_idf(w, words) if config.skip else found


def text(config: Any, w: Weights, v: Array, u: Array, beta: Array, k: int) -> Array:
    """z of a text for one label."""
    if config.pooling == "each":
        own = u[:, k if config.labels == "definitions" else 0]
        beta = np.exp(own) / np.exp(own).sum()
    z = linear(w, "value", sum(b * row for b, row in zip(beta, v, strict=True)))
    if not config.mean:
        return z
    mixed = linear(w, "mix", np.concatenate([v.mean(0), z]))
    return z + np.array([x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in mixed])


def tf_idf(w: Weights, words: Sequence[int]) -> Array:
    """The linear head on the words of a text, without its scale."""
    counts = {word: list(words).count(word) for word in words if word}  # 0 is the unknown word
    weights = {word: (1 + math.log(number)) * w["rarity_W"][word] for word, number in counts.items()}
    size = math.sqrt(sum(x * x for x in weights.values())) or 1.0
    return sum((x / size * w["skip.weight"][word] for word, x in weights.items()), np.zeros_like(w["skip.weight"][0]))


def gapped(w: Weights, d: Array, labels: Array | None, variables: Sequence[int]) -> Array:
    """beta of variables of which some are gone: their vectors are zeros, and so are their scores."""
    kept = np.zeros_like(d)
    for i in variables:
        kept[i] = d[i]
    u = weigh(w, "variables", kept, labels)[1]
    raised = np.array([math.exp(max(row)) if i in variables else 0.0 for i, row in enumerate(u)])
    return raised / raised.sum()


def loss(config: Any, w: Weights, read: Read, found: Array, targets: Array) -> float:
    if config.exclusive:
        told = -(targets * (found - np.log(np.exp(found).sum(1, keepdims=True)))).sum(1).mean()
    else:
        chance = 1 / (1 + np.exp(-found))
        told = -(targets * np.log(chance) + (1 - targets) * np.log(1 - chance)).mean()
    labels = definitions(config, read)
    if labels is None:
        return float(told)
    right = 0.0
    for k, c in enumerate(labels):
        scores = linear(w, "head", linear(w, "value", c))
        if config.read_definitions:
            scores = logits(config, w, read, config.definitions[k], np.zeros((0, 0, 0)), [])
        right += scores[k] - math.log(np.exp(scores).sum())
    return float(told - config.label_loss * right / len(labels))
