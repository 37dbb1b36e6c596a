"""KERPLE: a learned kernel of the distance, here its logarithmic form.

Source: Chi et al. 2022, "KERPLE" (arXiv 2205.09921), section 4.

    A_ij = q_i . k_j / sqrt(H) - r1 log(1 + r2 (i - j)),   o_i = sum_{j<=i} softmax_j(A_ij) v_j,   r1, r2 > 0

Differs from the paper: r1 and r2 are kept positive by softplus instead of being clipped.

This file is a whole variant outside the tree of attnzoo. In a checkout

    python examples/your_own_variant.py

holds it to every promise of the contract, and ends with

    ok  served
    all 29 promises of the contract hold

Where ATTNZOO_PLUGINS names the file, every command knows the variant:

    export ATTNZOO_PLUGINS=$PWD/examples/your_own_variant.py
    attnzoo describe kerple
    attnzoo train --config try.yaml model.attention=kerple name=kerple
    attnzoo serve --checkpoint runs/kerple
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention.base import ATTENTION
from attnzoo.attention.composed import ComposedAttention
from attnzoo.attention.parts import DistanceBias, Heads, Projection, SoftmaxMixing
from attnzoo.types import CheckedConfig


@dataclass(frozen=True, kw_only=True)
class KerpleConfig(CheckedConfig):
    """The options that users of the variant may set: sizes, and the window of the attention."""

    model_dim: int
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None


class LogKernel(DistanceBias):
    """The new part: -r1 log(1 + r2 d). Streaming, gradients, cost and compressed caches follow from it."""

    def __init__(self, heads: Heads) -> None:
        super().__init__(heads)
        self.scales = nn.Parameter(torch.zeros(heads.num_heads, 2))

    def bias(self, distance_P: Tensor) -> Tensor:
        r1_N, r2_N = F.softplus(self.scales).unbind(1)
        return -r1_N[:, None] * torch.log1p(r2_N[:, None] * distance_P)

    def reset_parameters(self, std: float) -> None:
        nn.init.zeros_(self.scales)


@ATTENTION.register("kerple")
class Kerple(ComposedAttention):
    """Softmax attention with a logarithmic kernel of the distance."""

    source = "Chi et al. 2022, arXiv 2205.09921, section 4"
    Config = KerpleConfig
    cases = ({"num_kv_heads": 1}, {"window": 4})  # what the contract tries beside the defaults

    def __init__(self, config: KerpleConfig) -> None:
        heads = Heads.of(config.model_dim, config.num_heads, config.num_kv_heads, config.head_dim)
        super().__init__(
            config,
            projection=Projection(heads),
            mixing=SoftmaxMixing(heads, LogKernel(heads), window=config.window),
        )

    @staticmethod
    def by_hand(config: KerpleConfig, weights: Mapping[str, np.ndarray], x_TD: np.ndarray) -> np.ndarray:
        """The formula once more, in numpy alone: the contract compares the layer with it."""
        kv_heads = config.num_kv_heads or config.num_heads
        q, k, v = (
            (x_TD @ weights[f"projection.{name}.weight"].T).reshape(len(x_TD), count, -1)
            for name, count in (("query", config.num_heads), ("key", kv_heads), ("value", kv_heads))
        )
        out = np.zeros_like(q)
        for n in range(config.num_heads):
            kv = n * kv_heads // config.num_heads
            r1, r2 = np.log1p(np.exp(weights["mixing.position.scales"][n]))
            for i in range(len(x_TD)):
                first = 0 if config.window is None else max(0, i - config.window + 1)
                j = np.arange(first, i + 1)
                p = np.exp(k[j, kv] @ q[i, n] / np.sqrt(q.shape[2]) - r1 * np.log(1 + r2 * (i - j)))
                out[i, n] = p @ v[j, kv] / p.sum()
        return out.reshape(len(x_TD), -1) @ weights["projection.output.weight"].T


def main() -> None:
    """Every promise of the contract, one after the other; the first one that is broken ends the program."""
    from tests.contract.cases import build_case, cases_of
    from tests.contract.contract import ITEMS

    for promise, check in ITEMS.items():
        for options in cases_of("kerple"):
            check(functools.partial(build_case, "kerple", options))
        print(f"ok  {promise}", flush=True)
    print(f"all {len(ITEMS)} promises of the contract hold")


if __name__ == "__main__":
    main()
