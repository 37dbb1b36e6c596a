"""Softmax operations under every kind of mask: cases on which their implementations must agree."""

import math
from dataclasses import replace

import torch

from attnzoo.ops.biased_sdpa import biased_sdpa
from attnzoo.ops.common.masks import CAUSAL, Mask, padding_keys
from attnzoo.ops.pairwise_sdpa import PairBias, pairwise_sdpa
from attnzoo.ops.relative_sdpa import relative_sdpa
from attnzoo.ops.sdpa import sdpa
from attnzoo.ops.sinusoid_sdpa import sinusoid_sdpa

B, N, K, T, S, H, P, D = 2, 6, 3, 5, 11, 7, 4, 10


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sparse_positions() -> tuple[torch.Tensor, torch.Tensor]:
    """Queries at unequal places; each kv head keeps other keys, in no order, with holes (-1)."""
    queries_BT = torch.tensor([[20, 21, 22, 23, 24], [7, 8, 9, 10, 11]])
    generator = torch.Generator().manual_seed(3)
    keys_BKS = torch.stack(
        [torch.stack([torch.randperm(26, generator=generator)[:S] for _ in range(K)]) for _ in range(B)]
    )
    keys_BKS[:, :, 2] = -1
    keys_BKS[:, :, 3] = 0  # every query sees at least one key
    return queries_BT, keys_BKS


def ahead(mask: Mask) -> int:
    """Rows for keys after the query, where a mask shows them."""
    return 2 if mask.ahead else 0


def hiding_bias(i: torch.Tensor, j: torch.Tensor, head: torch.Tensor, gain: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Depends on more than the distance, is not defined for i - j below -30, and hides every third key of a head."""
    bias = (i + j + 30.0).log().double() * (head + 1) - (i - j + 31.0).log() / 4
    return (bias * gain).masked_fill((j - head) % 3 == 1, -math.inf)


SOFTMAX_OPS = {
    "sdpa": lambda qkv, **rest: sdpa(*qkv, **rest),
    "biased_sdpa": lambda qkv, mask=CAUSAL, **rest: biased_sdpa(
        *qkv, bias_NP=rand(N, P, seed=7), future_rows=ahead(mask), mask=mask, **rest
    ),
    "relative_sdpa": lambda qkv, mask=CAUSAL, **rest: relative_sdpa(
        *qkv,
        future_rows=ahead(mask),
        mask=mask,
        content_bias_NH=rand(N, H, seed=4),
        table_NPH=rand(N, P, H, seed=5),
        table_bias_NP=rand(N, P, seed=6),
        **rest,
    ),
    "pairwise_sdpa": lambda qkv, **rest: pairwise_sdpa(*qkv, bias=PairBias(hiding_bias, N), **rest),
    "sinusoid_sdpa": lambda qkv, **rest: sinusoid_sdpa(
        *qkv,
        content_bias_NH=rand(N, H, seed=4),
        position_bias_NH=rand(N, H, seed=5),
        weight_NHD=rand(N, H, D, seed=6),
        **rest,
    ),
}


EMPTY = torch.tensor([[True] * 7 + [False] * 4, [False] * S])
REGIONS = torch.rand(B, N, T, S, generator=torch.Generator().manual_seed(9)) < 0.3
REGIONS[0, 2, 3] = False
QUERIES, KEYS = sparse_positions()
NOWHERE = torch.stack([KEYS[0], torch.full_like(KEYS[1], -1)])
MASKS = {
    # mask, queries, keys
    "full": (Mask.full(), T, S),
    "full, fewer keys": (Mask.full(EMPTY[:, 5:9]), T, 4),
    "keys that exist": (Mask.full(EMPTY), T, S),
    "no key": (Mask.full(), T, 0),
    "prefix": (Mask(prefix_B=torch.tensor([4, 2])), T, T),
    "prefix and window": (Mask(prefix_B=torch.tensor([3, 5]), window=2), T, T),
    "padded prefix": (Mask(prefix_B=torch.tensor([4, 2]), keys_BS=padding_keys(torch.tensor([3, 2]), T, "left")), T, T),
    "padding": (Mask(keys_BS=padding_keys(torch.tensor([3, 0]), T, "left")), T, T),
    "regions": (Mask.full(EMPTY, REGIONS), T, S),
    "regions of one query": (Mask.full(pairs=REGIONS[:, 0, 3:4]), 1, S),
    "causal regions": (Mask(pairs=REGIONS[:, 0, :, :T]), T, T),
    "streamed prefix": (
        Mask(prefix_B=torch.tensor([23, 9]), query_positions_BT=QUERIES, key_positions_BKS=NOWHERE),
        T,
        S,
    ),
    "streamed full": (Mask(causal=False, query_positions_BT=QUERIES, key_positions_BKS=NOWHERE), T, S),
    "a step without keys": (Mask(query_positions_BT=QUERIES[:, :1], key_positions_BKS=NOWHERE), 1, S),
}


def check_implementations(name: str, case: str, peaked: bool = False) -> None:
    """torch's implementation against the reference, forward and backward. What sees nothing is exactly zero, and
    nothing is NaN. Peaked scores take another way through torch."""
    mask, tokens, entries = MASKS[case]
    mask = replace(mask)  # a mask keeps what was computed of it, be it under another test's mutation
    size = 40.0 if peaked else 1.0
    qkv = [rand(B, N, tokens, H) * size, rand(B, K, entries, H, seed=1), rand(B, K, entries, H, seed=2)]
    qkv = [x.requires_grad_() for x in qkv]
    run, weights = SOFTMAX_OPS[name], rand(B, N, tokens, H, seed=3)
    outs = [run(qkv, mask=mask, impl=impl) for impl in ("reference", "torch")]
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-11 * size)
    grads = [torch.autograd.grad((out * weights).sum(), qkv, allow_unused=True) for out in outs]
    for label, want, got in zip("qkv", *grads, strict=True):
        want = torch.zeros_like(got) if want is None else want
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9, msg=lambda text, label=label: f"{label}: {text}")
    empty = ~mask.visible(tokens, entries, weights.device).any(-1)
    empty = empty.repeat_interleave(N // empty.shape[1], 1).expand(B, N, tokens)
    with torch.no_grad():
        for out in (outs[0], outs[1], run(qkv, mask=mask, impl="torch")):
            assert (out[empty] == 0.0).all()
    assert (grads[1][0][empty] == 0.0).all()
