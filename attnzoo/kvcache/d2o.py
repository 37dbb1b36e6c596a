"""D2O: layers whose attention is spread evenly keep more tokens, and evicted tokens are merged into similar ones.

Source: Wan et al. 2024, "D2O: Dynamic Discriminative Operations for Efficient Long-Context Inference" (arXiv
2406.13035), sections 3.2 and 3.3. With S tokens asked for, layer l keeps S_l = alpha_l S (see `budgets`): the first
`sinks`, the most recent, and those of the highest accumulated attention, 3 of these per recent one. An evicted token is
merged into the kept token of the most similar key, if it is similar enough (see `attnzoo.ops.evict_merge.MergeRule`).

Differs from the paper: column sums grow with the prompt, so exp(-F) would leave all to one layer; variances are scaled
to 0..1 over the layers first. A budget that a layer cannot use goes to the others. Every kv head keeps its own tokens
(per="layer": all heads of a layer keep the same). While decoding, the token to evict is chosen before the current
step's attention is added, and is merged into an older token, never into the newest, which takes its slot afterwards.

flavor="official" follows the authors' code: variances are scaled over the heads of a layer, the first two layers and
the last keep everything, there are as many recent as heavy tokens, beta is 0.5 on the mean similarity, and merge
weights are u_i and 1/(1+n). Every kv head keeps its own tokens. Whether the n-th evicted token of each head is merged
is decided once for all heads, by the mean of their similarities; each is merged into the nearest token of its own head.

Differs from the authors' code: kept tokens, scores and that mean are per kv head; theirs are per query head. The
threshold starts anew with every sequence; theirs carries over to the next. Nothing is merged into the newest token;
theirs allows it. A budget is keep_ratio of the prompt, rounded up, and its recent tokens are rounded down; theirs
rounds both parts separately and can be one token smaller. Prompts are compressed at their end; theirs before decoding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from attnzoo.kvcache import compressed as cc
from attnzoo.kvcache.base import CACHES, CachedLayer
from attnzoo.kvcache.budgets import allocate, layer_weights, moments, variance
from attnzoo.kvcache.merging import MergingCache
from attnzoo.kvcache.options import TokenOptions, check_ratio
from attnzoo.ops.evict_merge import MergeRule


@dataclass(frozen=True, kw_only=True)
class D2OConfig(TokenOptions):
    """flavor: "paper" (the equations of the paper) or "official" (the authors' code, with other layer budgets,
    thresholds and weights of merging).

    budget: "layer" (by the attention of each layer) or "uniform". per: whether each "kv_head" (default) or each "layer"
    has its own set of kept tokens. beta: weight of the newest similarity in the threshold, by default the flavor's.
    heavy_ratio: of the kept tokens that are not sinks, the part chosen by attention. merge: whether evicted tokens are
    merged. merge_counts: whether a merged entry counts as the p tokens it stands for (log p is added to its logit,
    after KeepKV, arXiv 2504.09936).
    """

    flavor: Literal["paper", "official"] = "paper"
    budget: Literal["layer", "uniform"] = "layer"
    per: Literal["kv_head", "layer"] | None = None
    beta: float | None = None
    heavy_ratio: float | None = None
    merge: bool = True
    merge_counts: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta", "heavy_ratio"):
            value = getattr(self, name)
            if value is not None:
                check_ratio(name, value)


WHOLE_FIRST, WHOLE_LAST = 2, 1
"""Layers that the authors' code never compresses."""


@CACHES.register("d2o")
class D2OCache(MergingCache):
    """Evicts the token with the least accumulated attention."""

    source = "Wan et al. 2024, arXiv 2406.13035, sections 3.2 and 3.3"
    Config: ClassVar[type] = D2OConfig

    def __init__(self, config: D2OConfig) -> None:
        super().__init__(config)
        official = config.flavor == "official"
        self.shared = config.per == "layer"
        heavy = config.heavy_ratio or (0.5 if official else 0.75)
        self.recent_share = 1.0 - heavy
        self.rule = MergeRule(
            kind="drop" if not config.merge else config.flavor,
            beta=config.beta or (0.5 if official else 0.7),
            together=official,
        )

    def priorities(self, positions_BKS: Tensor, entries: Mapping[str, Tensor]) -> Tensor:
        return entries["accumulated"]

    def layer_budgets(self, layers: Sequence[CachedLayer], asked_B: Tensor) -> list[Tensor]:
        lengths_B = layers[0].lengths_B
        official = self.config.flavor == "official"
        whole = {*range(WHOLE_FIRST), *range(len(layers) - WHOLE_LAST, len(layers))} if official else set()
        some = [i for i in range(len(layers)) if i not in whole]
        # A layer can use no more than the prompt has, unless more was asked for.
        high_B = torch.maximum(lengths_B, asked_B)
        budgets = [high_B for _ in layers]
        if not some:
            return budgets
        if self.config.budget == "uniform":
            shares = asked_B.expand(len(some), -1)
        else:
            weights_LB = layer_weights([_attention_variance(layers[i]) for i in some], per_head=official)
            low_B = torch.full_like(asked_B, cc.least_kept(self.config))
            shares = allocate(weights_LB, len(some) * asked_B, low_B, high_B)
        for i, budget_B in zip(some, shares, strict=True):
            budgets[i] = budget_B
        return budgets


def _attention_variance(layer: CachedLayer) -> Tensor:
    """variance_BK of the accumulated attention of a layer's tokens, evicted ones included."""
    entries = layer.state.entries(layer.lengths_B)
    accumulated = entries["accumulated"]
    held = (entries["positions"] >= 0).expand_as(accumulated)
    return variance(layer.state.moments_BK3 + moments(accumulated, held))
