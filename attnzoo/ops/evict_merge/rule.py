"""How evicted entries are merged into kept ones, and the inputs and results of the two operations."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class MergeRule:
    """kind "drop": evicted entries are lost. "paper" (arXiv 2406.13035, eq. 8-11) and "official" (the authors' code):

    u_i = max_j cos(k_i, k_j), j* its argmax (the lowest slot wins ties); i merges into j* iff u_i >= threshold.
    threshold: the mean of u at first; then "paper" beta * max(u) + (1 - beta) * before, "official" beta * mean(u) + (1
    - beta) * before. Merged entries, x a key or a value, i over those that come to j: "paper": x_j <- (e p_j x_j +
    sum_i exp(u_i) p_i x_i) / (e p_j + sum_i exp(u_i) p_i) "official": x_j <- (p_j x_j + sum_i u_i p_i x_i) / (p_j +
    sum_i p_i) with p the merge counts (1 without any; p_j <- p_j + sum_i p_i). together: all kv heads of a sequence
    evict equally many entries, and whether the n-th evicted entries of all heads are merged is one decision, by the
    mean of their u; each is merged into its own j*.
    """

    kind: Literal["drop", "paper", "official"] = "paper"
    beta: float = 0.7
    together: bool = False


@dataclass(frozen=True, kw_only=True)
class Merged:
    """M slots per kv head. source_BKM (int64): the slot that each entry came from, ascending, -1 for an empty slot
    (keys and values are 0 there). merge_counts_BKM: None unless merge counts were given. threshold_BK: NaN where
    nothing was ever evicted."""

    keys_BKMC: Tensor
    values_BKMV: Tensor
    source_BKM: Tensor
    merge_counts_BKM: Tensor | None
    threshold_BK: Tensor


@dataclass(frozen=True, kw_only=True)
class Slots:
    """Entries that a step changes in place. norms_BKP: Euclidean norms of the keys as stored; a slot with norm 0 is
    empty, or has a zero key, and nothing is merged into it. merge_counts_BKP: None without merge counts."""

    keys_BKPC: Tensor
    values_BKPV: Tensor
    norms_BKP: Tensor
    merge_counts_BKP: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """One entry per kv head, to be written to slot_BK (int64; -1: none); None: to the slots of the victims."""

    key_BKC: Tensor
    value_BKV: Tensor
    slot_BK: Tensor | None = None
