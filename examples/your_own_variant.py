"""KERPLE, logarithmic form: scores fall with the logarithm of the distance, as each head learns it.

Source: T.-C. Chi, T.-H. Fan, P. J. Ramadge, A. I. Rudnicky, 2022, KERPLE (arXiv 2205.09921), logarithmic variant.

    A_ij = q_i . k_j / sqrt(H) - r1 log(1 + r2 (i - j)),   o_i = sum_{j<=i} softmax_j(A_ij) v_j

Differs from the paper: r1 = softplus(a) and r2 = softplus(b) keep both positive; a and b are what is learned.

This file is a whole variant, outside the tree of attnzoo. In a checkout

    python examples/your_own_variant.py

holds it to every promise of the contract, and ends with

    ok  served
    all 21 promises of the contract hold

With the file named in ATTNZOO_PLUGINS every command knows the variant:

    export ATTNZOO_PLUGINS=$PWD/examples/your_own_variant.py
    attnzoo describe kerple
    attnzoo train --config rcmha.yaml model.attention=kerple name=kerple
    attnzoo serve --checkpoint runs/kerple
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from attnzoo.attention.base import ATTENTION
from attnzoo.attention.composed import ComposedAttention
from attnzoo.attention.parts import DistanceBias, Heads, Projection, SoftmaxMixing
from attnzoo.types import CheckedConfig


@dataclass(frozen=True, kw_only=True)
class KerpleConfig(CheckedConfig):
    """The options that users of the variant may set."""

    model_dim: int
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None


class LogarithmicBias(DistanceBias):
    """The new part: -r1 log(1 + r2 distance). Streaming, gradients, cost and compressed caches follow from it."""

    def __init__(self, heads: Heads) -> None:
        super().__init__(heads)
        self.a = nn.Parameter(torch.empty(heads.num_heads))
        self.b = nn.Parameter(torch.empty(heads.num_heads))
        self.reset_parameters(0.0)

    def bias(self, distance_P: Tensor) -> Tensor:
        r1, r2 = nn.functional.softplus(self.a), nn.functional.softplus(self.b)
        return -r1[:, None] * torch.log1p(r2[:, None] * distance_P)

    def reset_parameters(self, std: float) -> None:
        nn.init.zeros_(self.a)
        nn.init.zeros_(self.b)


@ATTENTION.register("kerple")
class Kerple(ComposedAttention):
    """a learned logarithm of the distance (KERPLE)"""

    source = "arXiv 2205.09921"
    Config = KerpleConfig
    cases = ({}, {"num_kv_heads": 1})  # what the contract is tried with

    def __init__(self, config: KerpleConfig) -> None:
        heads = Heads.of(config.model_dim, config.num_heads, config.num_kv_heads, config.head_dim)
        super().__init__(config, projection=Projection(heads), mixing=SoftmaxMixing(heads, LogarithmicBias(heads)))

    @staticmethod
    def by_hand(config: KerpleConfig, weights: Mapping[str, np.ndarray], x_TD: np.ndarray) -> np.ndarray:
        """The formula once more, in numpy alone: the contract compares the layer with it."""
        tokens, heads = len(x_TD), config.num_heads
        kv_heads = config.num_kv_heads or heads
        q, k, v = (
            (x_TD @ weights[f"projection.{name}.weight"].T).reshape(tokens, count, -1)
            for name, count in (("query", heads), ("key", kv_heads), ("value", kv_heads))
        )
        r1, r2 = (np.logaddexp(0.0, weights[f"mixing.position.{name}"]) for name in "ab")
        out = np.zeros_like(q)
        for n in range(heads):
            kv = n * kv_heads // heads
            for i in range(tokens):
                distance = i - np.arange(i + 1)
                scores = k[: i + 1, kv] @ q[i, n] / q.shape[2] ** 0.5 - r1[n] * np.log1p(r2[n] * distance)
                p = np.exp(scores - scores.max())
                out[i, n] = p @ v[: i + 1, kv] / p.sum()
        return out.reshape(tokens, -1) @ weights["projection.output.weight"].T


def main() -> None:
    """Every promise of the contract, one after the other; the first one that is broken ends the program."""
    from tests.contract.cases import build_case
    from tests.contract.contract import ITEMS

    for promise, check in ITEMS.items():
        for options in Kerple.cases:
            check(functools.partial(build_case, "kerple", options))
        print(f"ok  {promise}", flush=True)
    print(f"all {len(ITEMS)} promises of the contract hold")


if __name__ == "__main__":
    main()
