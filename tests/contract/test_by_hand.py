"""Each variant against the formula of its paper, written out in numpy without any of the project's parts."""

import math

import numpy as np
import pytest
import torch

from attnzoo.attention import Attention
from tests.contract.contract import MODEL_DIM, build_case, inputs

TOKENS = 9


def weights(attention: Attention) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in attention.state_dict().items()}


def heads(x_TD: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, count: int) -> np.ndarray:
    """[T, N, H]."""
    y = x_TD @ weight.T + (0.0 if bias is None else bias)
    return y.reshape(len(x_TD), count, -1)


def project(attention: Attention, x_TD: np.ndarray) -> tuple[np.ndarray, ...]:
    w, sizes = weights(attention), attention.projection.heads
    counts = {"query": sizes.num_heads, "key": sizes.num_kv_heads, "value": sizes.num_kv_heads}
    return tuple(
        heads(x_TD, w[f"projection.{name}.weight"], w.get(f"projection.{name}.bias"), count)
        for name, count in counts.items()
    )


def softmax_rows(scores: list[float]) -> np.ndarray:
    shifted = np.exp(np.array(scores) - max(scores))
    return shifted / shifted.sum()


def attend(attention: Attention, q, k, v, score) -> np.ndarray:
    """Causal softmax attention with logits score(n, i, j) / sqrt(H), then the output map."""
    w = weights(attention)
    tokens, count, width = q.shape
    merged = np.zeros((tokens, count, width))
    for n in range(count):
        kv = n * k.shape[1] // count
        for i in range(tokens):
            probabilities = softmax_rows([score(n, i, j) / math.sqrt(width) for j in range(i + 1)])
            merged[i, n] = sum(p * v[j, kv] for j, p in enumerate(probabilities))
    bias = w.get("projection.output.bias", 0.0)
    return merged.reshape(tokens, -1) @ w["projection.output.weight"].T + bias


def convolve(x_TNH: np.ndarray, kernel: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
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


def convolved(attention: Attention, q, k, v) -> tuple[np.ndarray, ...]:
    w = weights(attention)
    return tuple(
        convolve(x, w[f"conv.{name}_kernel"], w.get(f"conv.{name}_bias"))
        for name, x in (("query", q), ("key", k), ("value", v))
    )


def rotate(x_TNH: np.ndarray, theta: float) -> np.ndarray:
    """Channel pairs (c, c + H/2) as complex numbers turned by t * theta^(-2c/H)."""
    half = x_TNH.shape[-1] // 2
    complex_x = x_TNH[..., :half] + 1j * x_TNH[..., half:]
    angles = np.arange(len(x_TNH))[:, None] * theta ** (-np.arange(half) / half)
    turned = complex_x * np.exp(1j * angles)[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def table_score(attention: Attention, q, k):
    """(q_i + u) . k_j + q_i . R[i-j] + S[i-j], the last row for what lies beyond the table."""
    w = weights(attention)
    u, table, bias = (w[f"mixing.position.{name}"] for name in ("content_bias", "table", "table_bias"))

    def score(n: int, i: int, j: int) -> float:
        row = min(i - j, bias.shape[1] - 1)
        key = k[j, n * k.shape[1] // q.shape[1]]
        return (q[i, n] + u[n]) @ key + q[i, n] @ table[n, row] + bias[n, row]

    return score


def compare(attention: Attention, by_hand) -> None:
    x = inputs(1, TOKENS, MODEL_DIM)
    with torch.no_grad():
        actual = attention(x)[0].numpy()
    np.testing.assert_allclose(actual, by_hand(attention, x[0].numpy()), rtol=0, atol=1e-11)


def plain(attention: Attention, x: np.ndarray) -> np.ndarray:
    q, k, v = project(attention, x)
    return attend(attention, q, k, v, lambda n, i, j: q[i, n] @ k[j, n * k.shape[1] // q.shape[1]])


def rotary(attention: Attention, x: np.ndarray, convolution: bool = False) -> np.ndarray:
    q, k, v = project(attention, x)
    if convolution:
        q, k, v = convolved(attention, q, k, v)
    q, k = rotate(q, 10000.0), rotate(k, 10000.0)
    return attend(attention, q, k, v, lambda n, i, j: q[i, n] @ k[j, n * k.shape[1] // q.shape[1]])


def table(attention: Attention, x: np.ndarray, convolution: bool = False) -> np.ndarray:
    q, k, v = project(attention, x)
    if convolution:
        q, k, v = convolved(attention, q, k, v)
    return attend(attention, q, k, v, table_score(attention, q, k))


def test_mha():
    compare(build_case("mha", {"position": "none"}), plain)
    compare(build_case("mha", {"num_kv_heads": 1, "qkv_bias": True, "output_bias": True}), rotary)


def test_mha_with_normed_heads():
    def by_hand(attention: Attention, x: np.ndarray) -> np.ndarray:
        """Qwen3: every head of q and k divided by its root mean square, times a gain, before it is turned."""
        w = weights(attention)
        q, k, v = project(attention, x)
        q, k = (
            y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * w[f"projection.{name}_norm.weight"]
            for name, y in (("query", q), ("key", k))
        )
        q, k = rotate(q, 10000.0), rotate(k, 10000.0)
        return attend(attention, q, k, v, lambda n, i, j: q[i, n] @ k[j, n * k.shape[1] // q.shape[1]])

    compare(build_case("mha", {"qk_norm": True, "num_kv_heads": 1}), by_hand)


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_mha_with_stretched_rotation(kind):
    """Llama 3.1's rule with the context cut to 64 positions, so that all three of its cases occur among 7 pairs."""

    def frequency(c: int) -> float:
        plain = 10000.0 ** (-c / 7)
        wavelength = 2 * math.pi / plain
        if kind == "linear" or wavelength > 64 / 1.0:
            return plain / 4.0
        if wavelength < 64 / 4.0:
            return plain
        smooth = (64 / wavelength - 1.0) / (4.0 - 1.0)
        return (1 - smooth) * plain / 4.0 + smooth * plain

    def turned(y: np.ndarray) -> np.ndarray:
        pairs = y[..., :7] + 1j * y[..., 7:]
        angles = np.arange(len(y))[:, None] * np.array([frequency(c) for c in range(7)])
        pairs = pairs * np.exp(1j * angles)[:, None]
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    def by_hand(attention: Attention, x: np.ndarray) -> np.ndarray:
        q, k, v = project(attention, x)
        q, k = turned(q), turned(k)
        return attend(attention, q, k, v, lambda n, i, j: q[i, n] @ k[j, n * k.shape[1] // q.shape[1]])

    scaling = {"kind": kind, "factor": 4.0, "original_max_positions": 64}
    compare(build_case("mha", {"rope_scaling": scaling}), by_hand)


def test_mdha():
    compare(build_case("mdha", {}), lambda attention, x: rotary(attention, x, convolution=True))


def test_rmha_table():
    compare(build_case("rmha", {}), table)


def test_rcmha():
    for options in ({}, {"conv_share_heads": True, "conv_bias": True}, {"num_kv_heads": 1}):
        compare(build_case("rcmha", options), lambda attention, x: table(attention, x, convolution=True))


def test_rmha_sinusoid():
    def by_hand(attention: Attention, x: np.ndarray) -> np.ndarray:
        """Transformer-XL's four terms with r_n = [sin(n w) ; cos(n w)], each W_R r_n computed as it stands."""
        q, k, v = project(attention, x)
        w = weights(attention)
        u, bias, w_r = (w[f"mixing.position.{name}"] for name in ("content_bias", "position_bias", "weight"))
        dim = w_r.shape[-1]
        frequencies = np.array([10000.0 ** (-2 * t / dim) for t in range(dim // 2)])

        def score(n: int, i: int, j: int) -> float:
            r = np.concatenate([np.sin((i - j) * frequencies), np.cos((i - j) * frequencies)])
            relative = w_r[n] @ r
            return q[i, n] @ k[j, n] + q[i, n] @ relative + u[n] @ k[j, n] + bias[n] @ relative

        return attend(attention, q, k, v, score)

    compare(build_case("rmha", {"position": "sinusoid"}), by_hand)


def test_linear():
    def by_hand(attention: Attention, x: np.ndarray) -> np.ndarray:
        """o_t = sum_{s<=t} gamma^(t-s) phi(q_t).phi(k_s) v_s over the same sum without v_s; phi = elu + 1."""
        q, k, v = project(attention, x)
        w = weights(attention)
        gamma = 1 / (1 + np.exp(-w["mixing.decay_logit"]))
        phi = lambda y: np.where(y > 0, y + 1, np.exp(y))  # noqa: E731
        q, k = phi(q), phi(k)
        out = np.zeros_like(q)
        for n in range(q.shape[1]):
            for t in range(len(q)):
                weight = [gamma[n] ** (t - s) * (q[t, n] @ k[s, n]) for s in range(t + 1)]
                out[t, n] = sum(a * v[s, n] for s, a in enumerate(weight)) / sum(weight)
        return out.reshape(len(x), -1) @ w["projection.output.weight"].T

    compare(build_case("linear", {}), by_hand)


def test_linear_as_the_in_context_learning_papers_use_it():
    """No feature map, no normaliser, no decay: o_t = sum_{s<=t} v_s (k_s . q_t)."""

    def by_hand(attention: Attention, x: np.ndarray) -> np.ndarray:
        q, k, v = project(attention, x)
        scores = np.einsum("tnh,snh->nts", q, k) * np.tril(np.ones((len(x), len(x))))
        out = np.einsum("nts,snh->tnh", scores, v)
        return out.reshape(len(x), -1) @ weights(attention)["projection.output.weight"].T

    compare(build_case("linear", {"normalise": False, "decay": False, "feature_map": "identity"}), by_hand)


def test_mesa():
    """o_t = V^T K (K^T K + ridge I)^-1 q_t over the rows up to t: ridge regression, by numpy's own solver."""

    def by_hand(attention: Attention, x: np.ndarray) -> np.ndarray:
        q, k, v = project(attention, x)
        w = weights(attention)
        out = np.zeros_like(q)
        for n in range(q.shape[1]):
            kv = n * k.shape[1] // q.shape[1]
            ridge = np.exp(w["mixing.log_ridge"][kv]) * np.eye(q.shape[2])
            for t in range(len(q)):
                keys, values = k[: t + 1, kv], v[: t + 1, kv]
                fitted = np.linalg.inv(keys.T @ keys + ridge) @ keys.T @ values
                out[t, n] = q[t, n] @ fitted
        return out.reshape(len(x), -1) @ w["projection.output.weight"].T

    for options in ({}, {"num_kv_heads": 1}):
        compare(build_case("mesa", options), by_hand)


@pytest.mark.parametrize("kind", ["in_context_linear", "softmax_regression"])
def test_in_context_layers(kind):
    """P sum_j W_V e_j weight(W_K e_j . W_Q e_t) over all tokens but the last two, for every token."""

    def by_hand(attention: Attention, x: np.ndarray) -> np.ndarray:
        w = weights(attention)
        count, read = attention.config.num_heads, len(x) - 2
        q, k, v = (heads(x, w[f"{name}.weight"], None, count) for name in ("query", "key", "value"))
        out = np.zeros_like(q)
        for n in range(count):
            for t in range(len(x)):
                scores = [k[j, n] @ q[t, n] for j in range(read)]
                amounts = softmax_rows(scores) if kind == "softmax_regression" else scores
                out[t, n] = sum(a * v[j, n] for j, a in enumerate(amounts))
        return out.reshape(len(x), -1) @ w["output.weight"].T

    compare(build_case(kind, {"num_queries": 2}), by_hand)
