"""Plausible mistakes in cache policies: each must fail the check that is written for it."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from attnzoo.kvcache import State, compressed, eviction, merging, ring, tailed, think
from attnzoo.ops.evict_merge import torch as merge_torch
from attnzoo.ops.paged_decode import torch as decode_torch
from tests.contract.caches import CHECKS
from tests.unit import test_cache_ops as ops
from tests.unit import test_cache_policies as policies
from tests.unit import test_think as think_options

Patch = pytest.MonkeyPatch


def scale_of_the_kept_channels(patch: Patch) -> None:
    """sqrt(C) in place of sqrt(H)."""
    right = decode_torch._kept

    def wrong(q, channels):
        kept = right(q, channels)
        return kept * (q.shape[-1] / kept.shape[-1]) ** 0.5

    patch.setattr(decode_torch, "_kept", wrong)


def mask_of_the_first_query_head(patch: Patch) -> None:
    """Scores of one query head of the group in place of all."""
    from attnzoo.kvcache import channels

    right = channels.grouped
    patch.setattr(channels, "grouped", lambda q, kv: right(q[:, :: q.shape[1] // kv], kv))


def merged_token_moves(patch: Patch) -> None:
    """A token takes the position of the one whose slot it gets."""
    right = merging.put

    def wrong(kept, choice, arriving):
        right(kept, choice, arriving | {"positions": arriving["positions"] - 1})

    patch.setattr(merging, "put", wrong)


def weights_without_the_kept_token(patch: Patch) -> None:
    """The kept entry counts once, not exp(1) times."""
    patch.setattr(merge_torch.math, "e", 1.0)


def threshold_of_all_sequences(patch: Patch) -> None:
    """The threshold survives into the next sequence."""
    right = eviction.EvictingCache._evicted
    last = {}

    def wrong(self, layer, budgets_B):
        before = last.get(self.__class__)
        if before is not None and before["thresholds_BK"].shape == layer.state.thresholds_BK.shape:
            layer = replace(layer, state=replace(layer.state, **before))
        state = right(self, layer, budgets_B)
        last[self.__class__] = {name: getattr(state, name) for name in ("thresholds_BK", "has_threshold_BK")}
        return state

    patch.setattr(eviction.EvictingCache, "_evicted", wrong)


def tail_keeps_the_big_buffer(patch: Patch) -> None:
    """The tail of a compressed cache is a view of the full one."""

    def wrong(state, first_B, lengths_B):
        slots = state.tail.keys_BKSH.shape[2]
        return type(state.tail)(state.tail.keys_BKSH[:, :, slots - 4 :], state.tail.values_BKSH[:, :, slots - 4 :])

    patch.setattr(think, "cut_tail", wrong)


def tail_positions_restart(patch: Patch) -> None:
    """What follows a compressed prompt counts from 0."""
    right = compressed.append

    def wrong(state, new):
        state, view = right(state, new)
        starts = state.starts_B[:, None, None]
        return state, replace(view, positions_BKS=torch.where(view.positions_BKS >= 0, view.positions_BKS - starts, -1))

    patch.setattr(tailed.cc, "append", wrong)


def idle_rows_enter_the_ring(patch: Patch) -> None:
    """Padding is written like a token."""
    right = ring.enter

    def wrong(ring, k, v, now):
        right(ring, k, v, replace(now, entering=replace(now.entering, meant_BK=None)))

    patch.setattr(eviction, "enter", wrong)


def mass_of_padding(patch: Patch) -> None:
    """Padding queries of a short row count."""
    right = merging.accumulated_attention
    patch.setattr(merging, "accumulated_attention", lambda *args, **rest: right(*args, **(rest | {"counts_B": None})))


def sinks_may_leave(patch: Patch) -> None:
    """Only the most recent tokens are protected."""
    right = eviction.EvictingCache.protected
    patch.setattr(
        eviction.EvictingCache,
        "protected",
        lambda self, places, budgets, lengths: right(self, places + 99, budgets, lengths + 99),
    )


def short_prompts_join_as_they_are(patch: Patch) -> None:
    """A prompt within its budget has no ring, which the others read."""
    patch.setattr(eviction.EvictingCache, "to_joinable", lambda self, layers: [layer.state for layer in layers])


def rows_that_left_stay_in_memory(patch: Patch) -> None:
    """What is kept is a view."""
    right = State.keep_rows
    patch.setattr(State, "keep_rows", lambda self, order: right(self, [*order, 0]).rows(slice(0, len(order))))


def mask_of_the_tail_alone(patch: Patch) -> None:
    """A mask that is chosen anew forgets what has been pruned before."""
    right = think.stored_squares
    patch.setattr(think, "stored_squares", lambda *args: right(*args) * 0)


def lost_channels_come_back(patch: Patch) -> None:
    """An old entry shows another channel's number where it has lost one."""
    patch.setattr(think, "change_channels", lambda x, before, after, head_dim: x)


def contract(check: str, variant: str, name: str) -> Callable[[], None]:
    return lambda: CHECKS[check](variant, name)


MUTANTS: list[tuple[Callable[[Patch], None], Callable[[], None]]] = [
    (scale_of_the_kept_channels, ops.test_scale_keeps_the_full_head_dim),
    (mask_of_the_first_query_head, policies.test_think_scores_by_hand),
    (mask_of_the_tail_alone, lambda: think_options.test_a_recomputed_mask_by_hand("recomputed")),
    (lost_channels_come_back, contract("positions", "gqa", "think-recomputed")),
    (merged_token_moves, contract("positions", "gqa", "d2o")),
    (weights_without_the_kept_token, ops.test_merge_by_hand),
    (threshold_of_all_sequences, policies.test_threshold_belongs_to_one_sequence),
    (tail_keeps_the_big_buffer, contract("bytes", "gqa", "think")),
    (tail_positions_restart, contract("unequal_batch", "rcmha", "think")),
    (idle_rows_enter_the_ring, contract("idle_rows", "gqa", "d2o+think")),
    (short_prompts_join_as_they_are, contract("joined", "gqa", "d2o")),
    (rows_that_left_stay_in_memory, contract("joined", "gqa", "think")),
    (mass_of_padding, contract("unequal_batch", "gqa", "d2o")),
    (sinks_may_leave, contract("positions", "gqa", "random_tokens")),
]


@pytest.mark.parametrize(("mutate", "check"), MUTANTS, ids=[m[0].__name__ for m in MUTANTS])
def test_mutant_dies(mutate, check, monkeypatch):
    monkeypatch.setattr(compressed, "PAGE", 4)
    check()
    mutate(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        check()
