"""Mistakes in what a query sees: each dies by the item that is written for it."""

import dataclasses
import functools
from collections.abc import Callable

import pytest

from attnzoo.attention.composed import ParallelComposition
from attnzoo.attention.parts import Projection, linear, mixing, position
from attnzoo.ops.common import masks
from attnzoo.ops.common.step_inputs import StepInputs
from attnzoo.ops.linear_attention import full
from tests.contract.cases import all_cases, build_case
from tests.contract.contract import ITEMS

Patch = pytest.MonkeyPatch


def seen_otherwise(patch: Patch, **changed: Callable) -> None:
    """The formula of masks with some of its fields changed."""
    right = masks.sees

    def wrong(queries, keys, **fields):
        return right(queries, keys, **{name: changed.get(name, lambda x: x)(x) for name, x in fields.items()})

    patch.setattr(masks, "sees", wrong)


def padding_of_keys_ignored(patch: Patch) -> None:
    seen_otherwise(patch, exists=lambda exists: None)


def prefix_off_by_one(patch: Patch) -> None:
    seen_otherwise(patch, prefix=lambda prefix: None if prefix is None else prefix + 1)


def full_masks_stay_causal(patch: Patch) -> None:
    """No key after the query is seen after all."""
    right = mixing.SoftmaxMixing.forward

    def wrong(self, qkv, mask, impl):
        return right(self, qkv, mask if mask.causal or qkv[0].shape != qkv[1].shape else masks.Mask(), impl)

    patch.setattr(mixing.SoftmaxMixing, "forward", wrong)


def empty_row_sees_all(patch: Patch) -> None:
    """What is opened for the softmax's sake is not closed again."""
    right = masks._opened
    patch.setattr(masks, "_opened", lambda *fields: (right(*fields)[0], None))


def divided_by_nothing(patch: Patch) -> None:
    """0 / 0 where no key exists."""
    for module in (full, linear):
        patch.setattr(module, "normalised", lambda sums: sums[..., :-1] / sums[..., -1:])


def values_taken_from_x(patch: Patch) -> None:
    """Keys are the context's, values the sequence's own."""
    right = Projection.forward

    def wrong(self, x, context=None):
        q, k, v = right(self, x, context)
        return q, k, v if context is None or x.shape != context.shape else right(self, x)[2]

    patch.setattr(Projection, "forward", wrong)


def padding_of_a_held_context_ignored(patch: Patch) -> None:
    right = mixing.SoftmaxMixing.init_context
    patch.setattr(mixing.SoftmaxMixing, "init_context", lambda self, qkv, keys, impl: right(self, qkv, None, impl))


def positions_restart_over_a_held_context(patch: Patch) -> None:
    """Every chunk begins at position 0."""
    right = mixing.SoftmaxMixing._read

    def wrong(self, q, context, step, impl):
        return right(self, q, context, StepInputs(step.positions_BT - step.positions_BT[:, :1]), impl)

    patch.setattr(mixing.SoftmaxMixing, "_read", wrong)


def convolution_over_gaps(patch: Patch) -> None:
    """The first token of a padded row is convolved with padding."""
    patch.setattr(
        ParallelComposition,
        "_convolved",
        lambda self, qkv, of_context, mask, impl: self.conv(qkv, mask.starts_BT, impl),
    )


def sums_over_padding(patch: Patch) -> None:
    """Linear attention adds keys that do not exist."""
    right = full.summed
    patch.setattr(full, "summed", lambda k, v, keys, normalise: right(k, v, None, normalise))


def held_sums_over_padding(patch: Patch) -> None:
    right = linear.summed
    patch.setattr(linear, "summed", lambda k, v, keys, normalise: right(k, v, None, normalise))


def rows_ahead_off_by_one(patch: Patch) -> None:
    """Each distance reads the row of its neighbour, in all forms."""
    right = position.relative_sdpa
    patch.setattr(
        position, "relative_sdpa", lambda *qkv, **rest: right(*qkv, **(rest | {"future_rows": rest["future_rows"] - 1}))
    )


def a_normaliser_of_all_keys(patch: Patch) -> None:
    """A query is divided by the weights of keys that do not exist."""
    right = linear.LinearMixing._of_keys

    def wrong(self, qkv, mask, impl):
        return right(self, qkv, dataclasses.replace(mask, keys_BS=mask.keys_BS | True), impl)

    patch.setattr(linear.LinearMixing, "_of_keys", wrong)


LINEAR = {"decay": False, "num_kv_heads": 1}
MUTANTS: list[tuple[Callable[[Patch], None], str, dict, str]] = [
    (padding_of_keys_ignored, "mha", {}, "ragged"),
    (padding_of_keys_ignored, "rmha", {"position": "sinusoid"}, "masks"),
    (prefix_off_by_one, "mha", {"num_kv_heads": 1}, "prefix"),
    (prefix_off_by_one, "rmha", {"max_ahead": 5, "num_kv_heads": 1}, "prefix"),
    (full_masks_stay_causal, "mha", {"position": "none"}, "masks"),
    (full_masks_stay_causal, "mdha", {}, "order"),
    (empty_row_sees_all, "mha", {"qkv_bias": True, "output_bias": True}, "nothing_seen"),
    (values_taken_from_x, "mha", {}, "context"),
    (values_taken_from_x, "linear", LINEAR, "context"),
    (padding_of_a_held_context_ignored, "rcmha", {"max_ahead": 20}, "context_state"),
    (positions_restart_over_a_held_context, "mha", {}, "context_state"),
    (
        convolution_over_gaps,
        "mdha",
        {"qkv_bias": True, "output_bias": True, "conv_bias": True},
        "ragged",
    ),
    (sums_over_padding, "linear", LINEAR, "ragged"),
    (held_sums_over_padding, "linear", LINEAR, "context_state"),
    (divided_by_nothing, "linear", LINEAR, "nothing_seen"),
    (divided_by_nothing, "linear", LINEAR, "masks"),
    (rows_ahead_off_by_one, "rmha", {"max_ahead": 5, "num_kv_heads": 1}, "masks"),
    (a_normaliser_of_all_keys, "linear", LINEAR, "masks"),
]


@pytest.mark.parametrize(
    ("mutate", "kind", "options", "item"), MUTANTS, ids=[f"{m[0].__name__}-{m[1]}-{m[3]}" for m in MUTANTS]
)
def test_mutant_dies_where_it_should(mutate, kind, options, item, monkeypatch):
    assert (kind, options) in all_cases()  # unbroken it keeps the contract, as test_contract shows
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        ITEMS[item](functools.partial(build_case, kind, options))
