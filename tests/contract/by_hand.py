"""The formula of each variant's paper, written out in numpy without any of the project's parts.

`BY_HAND` has one for every variant of the tree, with all of its options; a variant outside says its own
(`Attention.by_hand`). `formula(config, weights, x_TD)` gives y_TD of one sequence in float64, `weights` by their names
in `state_dict`. Formulas of variants that take masks and a context have two more arguments: the context, and whether
query i sees key j.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Array = np.ndarray
Weights = Mapping[str, Array]
Score = Callable[[int, int, int], float]
Seen = Callable[[int, int], bool]


def heads(x_TD: Array, weight: Array, bias: Array | None, count: int) -> Array:
    """[T, N, H]."""
    y = x_TD @ weight.T + (0.0 if bias is None else bias)
    return y.reshape(len(x_TD), count, -1)


def project(config: Any, w: Weights, x_TD: Array, context_SD: Array | None = None) -> list[Array]:
    read = x_TD if context_SD is None else context_SD
    source = {"query": x_TD, "key": read, "value": read}
    kv_heads = config.num_kv_heads or config.num_heads
    counts = {"query": config.num_heads, "key": kv_heads, "value": kv_heads}
    return [
        heads(source[name], w[f"projection.{name}.weight"], w.get(f"projection.{name}.bias"), count)
        for name, count in counts.items()
    ]


def merge(w: Weights, out_TNH: Array) -> Array:
    bias = w.get("projection.output.bias", 0.0)
    return out_TNH.reshape(len(out_TNH), -1) @ w["projection.output.weight"].T + bias


def softmax_rows(scores: list[float]) -> Array:
    shifted = np.exp(np.array(scores) - max(scores))
    return shifted / shifted.sum()


def sees(config: Any, i: int, j: int) -> bool:
    """Causality, the window and the sinks."""
    return j <= i and (config.window is None or i - j < config.window or j < config.sinks)


def attend(config: Any, q: Array, v: Array, score: Score, seen: Seen | None) -> Array:
    """Softmax attention with logits score(n, i, j) / sqrt(H), over the keys that are seen, by default the past."""
    seen = seen or functools.partial(sees, config)
    tokens, count, width = q.shape
    out = np.zeros((tokens, count, v.shape[2]))
    for n in range(count):
        for i in range(tokens):
            keys = [j for j in range(len(v)) if seen(i, j)]
            if not keys:
                continue
            probabilities = softmax_rows([score(n, i, j) / math.sqrt(width) for j in keys])
            out[i, n] = sum(p * v[j, n * v.shape[1] // count] for p, j in zip(probabilities, keys, strict=True))
    return out


def convolve(x_TNH: Array, kernel: Array, bias: Array | None) -> Array:
    """y_t = sum_w kernel[..., w] x_{t - (W-1) + w}, by numpy's own convolution of each channel."""
    tokens, count, width = x_TNH.shape
    y = np.zeros_like(x_TNH)
    for n in range(count):
        for h in range(width):
            taps = kernel[n % len(kernel), h]
            y[:, n, h] = np.convolve(x_TNH[:, n, h], taps[::-1])[:tokens]
            if bias is not None:
                y[:, n, h] += bias[n % len(bias), h]
    return y


def convolved(w: Weights, qkv: list[Array]) -> list[Array]:
    return [
        convolve(x, w[f"conv.{name}_kernel"], w.get(f"conv.{name}_bias"))
        for name, x in zip(("query", "key", "value"), qkv, strict=True)
    ]


def frequency(config: Any, c: int, half: int) -> float:
    """Radians a position of channel pair c; stretched as Llama 3.1's rule or position interpolation has it."""
    plain = config.rope_theta ** (-c / half)
    scaling = getattr(config, "rope_scaling", None)
    if scaling is None:
        return plain
    wavelength = 2 * math.pi / plain
    old, low, high = (
        scaling.get(key, default)
        for key, default in (("original_max_positions", 8192), ("low_freq_factor", 1.0), ("high_freq_factor", 4.0))
    )
    if scaling["kind"] == "linear" or wavelength > old / low:
        return plain / scaling["factor"]
    if wavelength < old / high:
        return plain
    smooth = (old / wavelength - low) / (high - low)
    return (1 - smooth) * plain / scaling["factor"] + smooth * plain


def rotate(config: Any, x_TNH: Array) -> Array:
    """Channel pairs (c, c + H/2) as complex numbers turned by t * frequency."""
    half = x_TNH.shape[-1] // 2
    complex_x = x_TNH[..., :half] + 1j * x_TNH[..., half:]
    angles = np.arange(len(x_TNH))[:, None] * np.array([frequency(config, c, half) for c in range(half)])
    turned = complex_x * np.exp(1j * angles)[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def normed(config: Any, w: Weights, x_TNH: Array, name: str) -> Array:
    """Qwen3: every head divided by its root mean square, times a gain."""
    mean = (x_TNH**2).mean(-1, keepdims=True)
    return x_TNH / np.sqrt(mean + config.norm_eps) * w[f"projection.{name}_norm.weight"]


def rotary(config: Any, w: Weights, x: Array, context: Array | None = None, seen: Seen | None = None) -> Array:
    """MHA and MDHA: q . k, both convolved, normed and turned where asked for."""
    q, k, v = project(config, w, x, context)
    if getattr(config, "qk_norm", False):
        q, k = normed(config, w, q, "query"), normed(config, w, k, "key")
    if hasattr(config, "conv_width"):
        q, k, v = convolved(w, [q, k, v])
    if config.position == "rope":
        q, k = rotate(config, q), rotate(config, k)
    return merge(w, attend(config, q, v, lambda n, i, j: q[i, n] @ k[j, n * k.shape[1] // q.shape[1]], seen))


def relative(config: Any, w: Weights, x: Array, context: Array | None = None, seen: Seen | None = None) -> Array:
    """RMHA and RCMHA: (q_i + u) . k_j and a term of the distance, in either form."""
    q, k, v = project(config, w, x, context)
    if hasattr(config, "conv_width"):
        q, k, v = convolved(w, [q, k, v])
    u = w["mixing.position.content_bias"]
    sinusoid = getattr(config, "position", "table") == "sinusoid"
    term = sinusoid_term if sinusoid else functools.partial(table_term, config.max_ahead)

    def score(n: int, i: int, j: int) -> float:
        return (q[i, n] + u[n]) @ k[j, n * k.shape[1] // q.shape[1]] + term(w, q[i, n], n, i - j)

    return merge(w, attend(config, q, v, score, seen))


def table_term(ahead: int, w: Weights, q: Array, n: int, distance: int) -> float:
    """q . R[d] + S[d], the first row being that of the distance -ahead, and the last row that of what lies beyond."""
    table, bias = w["mixing.position.table"], w["mixing.position.table_bias"]
    row = max(0, min(distance + ahead, bias.shape[1] - 1))
    return q @ table[n, row] + bias[n, row]


def sinusoid_term(w: Weights, q: Array, n: int, distance: int) -> float:
    """(q + v) . W_R r_d with r_d = [sin(d w) ; cos(d w)], as Transformer-XL has it."""
    w_r, v = w["mixing.position.weight"], w["mixing.position.position_bias"]
    dim = w_r.shape[-1]
    angles = distance * np.array([10000.0 ** (-2 * t / dim) for t in range(dim // 2)])
    return (q + v[n]) @ w_r[n] @ np.concatenate([np.sin(angles), np.cos(angles)])


def linear(config: Any, w: Weights, x: Array, context: Array | None = None, seen: Seen | None = None) -> Array:
    """o_t = sum_{s<=t} gamma^(t-s) phi(q_t).phi(k_s) v_s, over the same sum without v_s where normalised."""
    maps = {
        "elu1": lambda y: np.where(y > 0, y + 1, np.exp(y)),
        "relu": lambda y: np.where(y > 0, y, 0.0),
        "identity": lambda y: y,
    }
    q, k, v = project(config, w, x, context)
    seen = seen or (lambda t, s: s <= t)
    q, k = maps[config.feature_map](q), maps[config.feature_map](k)
    out = np.zeros_like(q)
    for n in range(q.shape[1]):
        kv = n * k.shape[1] // q.shape[1]
        gamma = 1 / (1 + np.exp(-w["mixing.decay_logit"][kv])) if config.decay else 1.0
        for t in range(len(q)):
            weight = {s: gamma ** (t - s) * (q[t, n] @ k[s, kv]) for s in range(len(k)) if seen(t, s)}
            total = sum(weight.values()) if config.normalise and weight else 1.0
            out[t, n] = sum(a * v[s, kv] for s, a in weight.items()) / total
    return merge(w, out)


def mesa(config: Any, w: Weights, x: Array) -> Array:
    """o_t = V^T K (K^T K + ridge I)^-1 q_t over the rows up to t: ridge regression, by numpy's own solver."""
    q, k, v = project(config, w, x)
    out = np.zeros_like(q)
    for n in range(q.shape[1]):
        kv = n * k.shape[1] // q.shape[1]
        ridge = np.exp(w["mixing.log_ridge"][kv]) * np.eye(q.shape[2])
        for t in range(len(q)):
            keys, values = k[: t + 1, kv], v[: t + 1, kv]
            fitted = np.linalg.inv(keys.T @ keys + ridge) @ keys.T @ values
            out[t, n] = q[t, n] @ fitted
    return merge(w, out)


def in_context(config: Any, w: Weights, x: Array, softmax: bool) -> Array:
    """P sum_j W_V e_j weight(W_K e_j . W_Q e_t) over all tokens but the last `num_queries`, for every token."""
    read = len(x) - config.num_queries
    q, k, v = (heads(x, w[f"projection.{name}.weight"], None, config.num_heads) for name in ("query", "key", "value"))
    out = np.zeros_like(q)
    for n in range(config.num_heads):
        for t in range(len(x)):
            scores = [k[j, n] @ q[t, n] for j in range(read)]
            amounts = softmax_rows(scores) if softmax else scores
            out[t, n] = sum(a * v[j, n] for j, a in enumerate(amounts))
    return out.reshape(len(x), -1) @ w["projection.output.weight"].T


def tscan(config: Any, w: Weights, x: Array, context: Array | None = None, seen: Seen | None = None) -> Array:
    """Softmax over the tokens of another chunk; the paper's values are an MLP's of both chunks' tokens, side by side,
    zeros standing for a token that x lacks; those of the code are the other chunk's."""
    read = x if context is None else context
    count = config.num_heads
    q, k = (
        heads(of, w[f"projection.{n}.weight"], w.get(f"projection.{n}.bias"), count)
        for n, of in (("query", x), ("key", read))
    )
    said = read
    if config.flavor == "paper":
        both = np.stack([np.concatenate([x[s] if s < len(x) else 0.0 * x[0], read[s]]) for s in range(len(read))])
        said = np.maximum(both @ w["projection.pair.weight"].T + w["projection.pair.bias"], 0.0)
    v = heads(said, w["projection.value.weight"], w.get("projection.value.bias"), count)
    return merge(w, attend(config, q, v, lambda n, i, j: q[i, n] @ k[j, n], seen or (lambda i, j: True)))


BY_HAND: dict[str, Callable[[Any, Weights, Array], Array]] = {
    "mha": rotary,
    "mdha": rotary,
    "rmha": relative,
    "rcmha": relative,
    "linear": linear,
    "mesa": mesa,
    "tscan": tscan,
    "in_context_linear": lambda config, w, x: in_context(config, w, x, softmax=False),
    "softmax_regression": lambda config, w, x: in_context(config, w, x, softmax=True),
}
