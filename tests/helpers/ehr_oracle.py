"""TSCAN once more, one stay at a time, in numpy and loops: what `attnzoo.models.EhrEncoder` is held to."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray
Weights = Mapping[str, Array]


def layer_norm(w: Weights, name: str, x: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    scale = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(w: Weights, name: str, x: Array) -> Array:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def attention(
    config: Any, w: Weights, name: str, x: Array, y: Array, seen: Array, values: Array
) -> tuple[Array, Array]:
    """(output, weights [heads, queries, keys]) of softmax attention of x over y; values: what W_v is applied to."""
    width = config.model_dim // config.num_heads
    maps = np.zeros((config.num_heads, len(x), len(y)))
    out = np.zeros((len(x), config.model_dim))
    q, k = linear(w, f"{name}.projection.query", x), linear(w, f"{name}.projection.key", y)
    v = linear(w, f"{name}.projection.value", values)
    for head in range(config.num_heads):
        channels = slice(head * width, (head + 1) * width)
        for i in range(len(x)):
            keys = [j for j in range(len(y)) if seen[i, j]]
            scores = np.array([q[i, channels] @ k[j, channels] / math.sqrt(width) for j in keys])
            weights = np.exp(scores - scores.max())
            maps[head, i, keys] = weights / weights.sum()
            out[i, channels] = maps[head, i] @ v[:, channels]
    return linear(w, f"{name}.projection.output", out), maps


def feed_forward(w: Weights, name: str, x: Array) -> Array:
    return linear(w, f"{name}.down", np.maximum(linear(w, f"{name}.up", x), 0.0))


def tokens(config: Any, w: Weights, branch: str, cells_HVC: Array, statics: Array, before: int) -> Array:
    """The statics' token, and one for each hour, or for each variable."""
    at = f"branches.{branch}.tokens"
    cell, own = w[f"{at}.cell"], w[f"{at}.variable"]
    rows = [w[f"{at}.statics"] @ statics + w[f"{at}.stay"]]
    if config.clock:
        rows[0] = rows[0] + np.array([before / 24 / 7, math.log(1 + before / 24)]) @ w[f"{at}.clock"]
    hours, variables = cells_HVC.shape[:2]

    def embedded(h: int, v: int) -> Array:
        value, *others = cells_HVC[h, v]
        return np.array([max(value, 0.0), min(value, 0.0), *others]) @ cell[v]

    if branch == "temporal":
        for h in range(hours):
            rates = [10000.0 ** (-2 * c / config.model_dim) for c in range((config.model_dim + 1) // 2)]
            place = [math.sin(h * rate) for rate in rates] + [math.cos(h * rate) for rate in rates]
            place = np.float32(place[: config.model_dim]).astype(np.float64)
            rows.append(sum(embedded(h, v) + own[v] for v in range(variables)) + place)
    else:
        for v in range(variables):
            rows.append(own[v] + sum(w[f"{at}.hour"][h] * embedded(h, v) for h in range(hours)))
    return np.stack(rows)


def encoded(
    config: Any, w: Weights, branch: str, cells_TVC: Array, statics: Array, hours: int
) -> tuple[list[Array], list[Array], dict[str, Array]]:
    """(z of every chunk, which of its tokens exist, maps by name) of a stay of so many hours."""
    zs: list[Array] = []
    exists: list[Array] = []
    maps: dict[str, Array] = {}
    for chunk in range(max(-(-hours // config.chunk_hours), 1)):
        first = chunk * config.chunk_hours
        cells = np.zeros((config.chunk_hours, *cells_TVC.shape[1:]))
        real = max(min(hours - first, config.chunk_hours), 0)
        cells[:real] = cells_TVC[first : first + real]
        x = tokens(config, w, branch, cells, statics, first)
        exist = np.arange(len(x)) <= real if branch == "temporal" else np.ones(len(x), dtype=bool)
        number = min(chunk, 1) if config.share_fusion else chunk
        at, paper = f"branches.{branch}.encoders.{number}", config.flavor == "paper"
        blind = (branch == "temporal" and config.hourly) or (chunk > 0 and not paper)
        order = np.tril(np.ones((len(x), len(x)), dtype=bool)) if blind else np.ones((len(x), len(x)), dtype=bool)

        def added(x: Array, part: Any, norm: str) -> Array:
            return x + part(layer_norm(w, norm, x)) if paper else layer_norm(w, norm, x + part(x))  # noqa: B023

        def own(y: Array) -> Array:
            y = y * exist[:, None]  # noqa: B023
            out, maps[f"{branch}.{chunk}.self"] = attention(config, w, f"{at}.attention", y, y, order & exist, y)  # noqa: B023
            return out

        def cross(y: Array) -> Array:
            z = layer_norm(w, f"{at}.context_norm", zs[-1]) if paper else zs[-1]  # noqa: B023
            z = z * exists[-1][:, None]
            y = y * exist[:, None]  # noqa: B023
            both = np.maximum(linear(w, f"{at}.cross.projection.pair", np.hstack([y, z])), 0.0) if paper else z  # noqa: B023
            seen = order & exists[-1]  # noqa: B023
            out, maps[f"{branch}.{chunk}.cross"] = attention(config, w, f"{at}.cross", y, z, seen, both)  # noqa: B023
            return out

        x = added(x, own, f"{at}.attention_norm")
        if chunk:
            x = added(x, cross, f"{at}.cross_norm")
        x = added(x, lambda y: feed_forward(w, f"{at}.mlp", y), f"{at}.mlp_norm")  # noqa: B023
        zs.append(x)
        exists.append(exist)
    return zs, exists, maps


def pooled(w: Weights, branch: str, z: Array, exist: Array) -> tuple[Array, Array]:
    """(mean, learned sum and statics side by side, the learned weights)."""
    z = layer_norm(w, f"branches.{branch}.norm", z)
    kept = [j for j in range(1, len(z)) if exist[j]]
    weights = np.zeros(len(z) - 1)
    if not kept:
        return np.concatenate([0 * z[0], 0 * z[0], z[0]]), weights
    scores = np.exp(np.array([z[j] @ w[f"branches.{branch}.query"] for j in kept]))
    weights[np.array(kept) - 1] = scores / scores.sum()
    return np.concatenate([z[kept].mean(0), weights @ z[1:], z[0]]), weights


def summary(cells_TVC: Array) -> Array:
    """What `ehr_cells.SUMMARY` names, of each variable; 0 where there is no value."""
    rows: list[float] = []
    for v in range(cells_TVC.shape[1]):
        hours = [t for t in range(len(cells_TVC)) if cells_TVC[t, v, 1] > 0]
        if not hours:
            rows += [0.0] * 11
            continue
        x, time = cells_TVC[hours, v, 0], np.array(hours) / 12
        spread = ((time - time.mean()) ** 2).sum()
        trend = ((time - time.mean()) * (x - x.mean())).sum() / (1 + spread)
        deviation = x.var() / math.sqrt(1 + x.var())
        count = math.log1p(sum(math.expm1(c) for c in cells_TVC[:, v, 2]))
        share, recency = len(hours) / len(cells_TVC), 1 - min((len(cells_TVC) - 1 - hours[-1]) / 48, 1)
        rows += [x[-1], x[0], x.mean(), x.min(), x.max(), deviation, trend, count, share, recency, 1.0]
    return np.array(rows)


def logits(config: Any, w: Weights, cells_TVC: Array, statics: Array, hours: int) -> Array:
    """Of the whole stay."""
    fused = []
    for branch in ("temporal", "spatial") if config.branches == "both" else (config.branches,):
        zs, exists, _ = encoded(config, w, branch, cells_TVC, statics, hours)
        exist = exists[-1] if hours else np.zeros_like(exists[-1])
        fused.append(pooled(w, branch, zs[-1], exist)[0])
    return answer(config, w, np.concatenate(fused), cells_TVC[:hours], statics)


def hourly_logits(config: Any, w: Weights, cells_TVC: Array, statics: Array, hours: int) -> Array:
    """Of every hour: the tokens of the open chunk so far, and of the spatial branch the chunk before."""
    rows = []
    for hour in range(hours):
        chunk, place = divmod(hour, config.chunk_hours)
        fused = []
        for branch in ("temporal", "spatial") if config.branches == "both" else (config.branches,):
            zs, exists, _ = encoded(config, w, branch, cells_TVC, statics, hours)
            if branch == "temporal":
                z = layer_norm(w, "branches.temporal.norm", zs[chunk])
                fused += [z[1 : place + 2].mean(0), z[place + 1], z[0]]
            else:
                fused.append(pooled(w, branch, zs[max(chunk - 1, 0)], exists[0])[0] * (chunk > 0))
        rows.append(answer(config, w, np.concatenate(fused), cells_TVC[: hour + 1], statics))
    return np.array(rows)


def answer(config: Any, w: Weights, fused: Array, cells_TVC: Array, statics: Array) -> Array:
    told = [linear(w, "summary", np.concatenate([summary(cells_TVC), statics]))] if config.summary == "linear" else []
    if config.combine == "sum":
        out = sum([linear(w, "head", fused), *told])
    else:
        names = [name for name in ("temporal", "spatial") if config.branches in ("both", name)]
        width = 3 * config.model_dim
        of_branches = [linear(w, f"head.{name}", fused[i * width :][:width]) for i, name in enumerate(names)]
        halves = [sum(of_branches) / len(names), *told]
        out = sum(halves) / len(halves)
    if config.head == "ordinal":
        steps = w["steps"]
        out = out - np.cumsum([steps[0], *(math.log1p(math.exp(step)) for step in steps[1:])])
    return out
