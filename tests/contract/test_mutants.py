"""Broken variants must not pass: each mutant is one plausible mistake, and the contract has to notice it."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.attention import in_context
from attnzoo.attention.parts import Projection, Rope, convolution, linear, mesa, mixing, position
from attnzoo.kvcache import full, window
from attnzoo.ops.common import masks, row_blocks
from attnzoo.ops.common.step_inputs import StepInputs
from attnzoo.ops.linear_attention import torch as linear_torch
from attnzoo.ops.rope import torch as rope_torch
from attnzoo.ops.sinusoid_sdpa import torch as sinusoid_torch
from tests.contract.cases import all_cases, build_case
from tests.contract.contract import ITEMS, verify_contract

Patch = pytest.MonkeyPatch


def shift_off_by_one(patch: Patch) -> None:
    """Every distance reads the row of its neighbour."""
    right = row_blocks._table_rows
    patch.setattr(row_blocks, "_table_rows", lambda *where: (right(*where) - 1).clamp(0))


def unmasked_corner(patch: Patch) -> None:
    """What the shift moves right of the diagonal stays visible."""
    patch.setattr(row_blocks, "_hide", lambda scores, rows, span, mask, row: None)


def documents_leak(patch: Patch) -> None:
    """A block of rows leaves out keys before its documents, but a row sees all documents of its block."""
    right = row_blocks._hide

    def wrong(scores, rows, span, mask, row):
        return right(scores, rows, span, replace(mask, starts_BT=None), row)

    patch.setattr(row_blocks, "_hide", wrong)


def convolution_across_documents(patch: Patch) -> None:
    """The first rows of a document are convolved with the last ones of the document before."""
    right = convolution.depthwise_conv_qkv
    patch.setattr(
        convolution,
        "depthwise_conv_qkv",
        lambda qkv, kernels, **rest: right(qkv, kernels, **(rest | {"starts_BT": None})),
    )


def window_of_one_less(patch: Patch) -> None:
    """The ring of slots is one too short."""
    right = window.WindowCache.__init__
    patch.setattr(window.WindowCache, "__init__", lambda self, size, sinks=0: right(self, size - 1, sinks))


def sinks_fall_out(patch: Patch) -> None:
    """The first tokens leave the ring like all others."""
    right = window.WindowCache.__init__
    patch.setattr(window.WindowCache, "__init__", lambda self, size, sinks=0: right(self, size, 0))


def streamed_mask_of_the_chunk(patch: Patch) -> None:
    """The table is read for any distance, but hidden keys are not hidden while streaming."""
    patch.setattr(masks, "sees", lambda queries, keys, **fields: (keys >= -1) & (queries >= -1))


def convolution_without_state(patch: Patch) -> None:
    """Each chunk is convolved as if it were the start of the sequence."""
    right = convolution.depthwise_conv_qkv
    patch.setattr(
        convolution, "depthwise_conv_qkv", lambda qkv, kernels, **rest: right(qkv, kernels, **(rest | {"tails": None}))
    )


def tail_of_padding(patch: Patch) -> None:
    """The carried rows are the last rows of the chunk, padding included."""
    patch.setattr(convolution, "_next_tail", lambda tail, x, counts: torch.cat([tail, x], dim=1)[:, -tail.shape[1] :])


def one_conv_tail_for_all(patch: Patch) -> None:
    """The value convolution continues with the key's rows."""
    right = convolution.QKVConv.extend

    def wrong(self, qkv, state, counts_B, impl):
        mixed = convolution.QKVConvState(state.query, state.key, state.key)
        return right(self, qkv, mixed, counts_B, impl)

    patch.setattr(convolution.QKVConv, "extend", wrong)


def rotation_restarts(patch: Patch) -> None:
    """Rotary positions count from the start of the chunk."""
    right = mixing.SoftmaxMixing.extend

    def wrong(self, qkv, state, step, impl):
        q, k, v = qkv
        chunk = StepInputs(step.positions_BT - step.positions_BT[:, :1])
        q, k = self.position.encode(q, k, chunk, "auto")
        with patch.context() as inside:
            inside.setattr(type(self.position), "encode", lambda _, q, k, step, impl: (q, k))
            return right(self, (q, k, v), state, step, impl)

    patch.setattr(mixing.SoftmaxMixing, "extend", wrong)


def rotation_in_low_precision(patch: Patch) -> None:
    """Angles lose their phase in bfloat16."""
    patch.setattr(rope_torch, "accumulation_dtype", lambda dtype: dtype)


def cache_counts_padding(patch: Patch) -> None:
    """Padding of a short row enters its cache."""
    right = full.append

    def wrong(state, keys, values, step):
        return right(state, keys, values, StepInputs(step.positions_BT))

    patch.setattr(full, "append", wrong)


def cache_forgets_growth(patch: Patch) -> None:
    """A cache that outgrows its room loses what it held."""
    right = full.with_room

    def wrong(buffer: Tensor, used: int, new: Tensor) -> Tensor:
        grown = right(buffer, used, new)
        return grown if grown.shape == buffer.shape else torch.zeros_like(grown)

    patch.setattr(full, "with_room", wrong)


def sinusoids_of_the_wrong_sign(patch: Patch) -> None:
    """r_{j-i} in place of r_{i-j}."""
    right = sinusoid_torch.waves

    def wrong(rows: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        sin, cos = right(rows, width, device, dtype).chunk(2, dim=-1)
        return torch.cat([-sin, cos], dim=-1)

    patch.setattr(sinusoid_torch, "waves", wrong)


def linear_chunk_memory_undecayed(patch: Patch) -> None:
    """Between chunks the memory does not decay."""
    right = linear_torch._scan

    def wrong(added: Tensor, first: Tensor, weights: object, backwards: bool = False) -> tuple[Tensor, Tensor]:
        return right(added, first, dataclasses.replace(weights, kept=None), backwards)

    patch.setattr(linear_torch, "_scan", wrong)


def linear_reads_before_it_writes(patch: Patch) -> None:
    """A query does not see its own key."""
    right = linear_torch.linear_attention_torch

    def wrong(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        return right(q, F.pad(k, (0, 0, 1, -1)), F.pad(v, (0, 0, 1, -1)), *rest)

    patch.setattr("attnzoo.ops.linear_attention.linear_attention_torch", wrong)


def mesa_forgets_its_sums(patch: Patch) -> None:
    """Each chunk solves against its own keys alone."""
    right = mesa.ridge_queries
    patch.setattr(mesa, "ridge_queries", lambda q, k, ridge, **rest: right(q, k, ridge, **(rest | {"gram_BKHH": None})))


def mesa_documents_leak(patch: Patch) -> None:
    """Keys of earlier documents stay in the sums."""
    right = mesa.ridge_queries
    patch.setattr(mesa, "ridge_queries", lambda q, k, ridge, **rest: right(q, k, ridge, **(rest | {"starts_BT": None})))


def query_is_read(patch: Patch) -> None:
    """The last token, which asks, is among the keys."""
    right = in_context.InContextAttention.forward

    def wrong(self, x, **what):
        queries, self.config = self.config, dataclasses.replace(self.config, num_queries=0)
        out = right(self, x, **what)
        self.config = queries
        return out

    patch.setattr(in_context.InContextAttention, "forward", wrong)


def rotation_of_another_base(patch: Patch) -> None:
    """Frequencies of another base, in every implementation."""
    right = Rope.encode

    def wrong(self, q, k, positions, impl):
        self.theta = 9000.0
        return right(self, q, k, positions, impl)

    patch.setattr(Rope, "encode", wrong)


def heads_merged_in_another_order(patch: Patch) -> None:
    """Channels first, then heads."""
    patch.setattr(Projection, "merge", lambda self, o: self.output(o.transpose(1, 2).transpose(2, 3).flatten(2)))


def queries_scaled_twice(patch: Patch) -> None:
    """The projection divides by sqrt(H), and so do the scores."""
    right = Projection.forward

    def wrong(self, x, context=None):
        q, k, v = right(self, x, context)
        return q / self.heads.head_dim**0.5, k, v

    patch.setattr(Projection, "forward", wrong)


def kernel_reversed(patch: Patch) -> None:
    """The newest token meets the oldest weight."""
    right = convolution.QKVConv._kernels
    patch.setattr(convolution.QKVConv, "_kernels", lambda self: tuple(kernel.flip(-1) for kernel in right(self)))


def table_scaled(patch: Patch) -> None:
    """Distance takes part with half its weight."""
    right = position.relative_sdpa

    def wrong(*qkv, **rest):
        return right(*qkv, **(rest | {"table_bias_NP": rest["table_bias_NP"] / 2}))

    patch.setattr(position, "relative_sdpa", wrong)


def sinusoid_of_half_its_bias(patch: Patch) -> None:
    """v of Transformer-XL counts half."""
    right = position.sinusoid_sdpa

    def wrong(*qkv, **rest):
        return right(*qkv, **(rest | {"position_bias_NH": rest["position_bias_NH"] / 2}))

    patch.setattr(position, "sinusoid_sdpa", wrong)


def decay_squared(patch: Patch) -> None:
    """Each head forgets twice as fast."""
    right = linear.linear_attention

    def wrong(*qkv, decay_K=None, **rest):
        return right(*qkv, decay_K=None if decay_K is None else decay_K**2, **rest)

    patch.setattr(linear, "linear_attention", wrong)


def another_feature_map(patch: Patch) -> None:
    """elu without the one that makes it positive enough."""
    patch.setattr(linear.LinearMixing, "_features", lambda self, x: F.elu(x) + 1.1)


def ridge_squared(patch: Patch) -> None:
    """The regulariser enters squared."""
    right = mesa.ridge_queries
    patch.setattr(mesa, "ridge_queries", lambda q, k, ridge, **rest: right(q, k, ridge**2, **rest))


def gain_applied_twice(patch: Patch) -> None:
    """Normed heads are scaled once more."""
    right = Projection.forward

    def wrong(self, x, context=None):
        q, k, v = right(self, x, context)
        return q * self.query_norm.weight, k, v

    patch.setattr(Projection, "forward", wrong)


def window_one_wider(patch: Patch) -> None:
    """The mask lets one key more through, in all forms."""
    right = mixing.SoftmaxMixing.__init__

    def wrong(self, heads, position, *, window=None, sinks=0):
        right(self, heads, position, window=None if window is None else window + 1, sinks=sinks)

    patch.setattr(mixing.SoftmaxMixing, "__init__", wrong)


def asking_heads_swapped(patch: Patch) -> None:
    """In-context layers read with each other's queries."""
    right = position.sdpa
    patch.setattr(position, "sdpa", lambda q, k, v, **rest: right(q.flip(1), k, v, **rest))


SHARED: list[tuple[Callable[[Patch], None], str, dict]] = [
    (rotation_of_another_base, "mha", {}),
    (heads_merged_in_another_order, "linear", {}),
    (queries_scaled_twice, "rcmha", {}),
    (kernel_reversed, "mdha", {}),
    (table_scaled, "rmha", {}),
    (sinusoid_of_half_its_bias, "rmha", {"position": "sinusoid"}),
    (decay_squared, "linear", {}),
    (another_feature_map, "linear", {"decay": False}),
    (ridge_squared, "mesa", {}),
    (gain_applied_twice, "mha", {"qk_norm": True}),
    (window_one_wider, "mha", {"window": 4}),
    (window_one_wider, "rcmha", {"window": 4, "sinks": 3}),
    (asking_heads_swapped, "softmax_regression", {}),
]
"""Mistakes in code that `forward`, `extend` and `reference` share: these agree with each other, and are all wrong."""


@pytest.mark.parametrize(("mutate", "kind", "options"), SHARED, ids=[f"{m[0].__name__}-{m[1]}" for m in SHARED])
def test_a_mistake_that_all_forms_share_is_seen_by_hand(mutate, kind, options, monkeypatch):
    mutate(monkeypatch)
    build = functools.partial(build_case, kind, options)
    ITEMS["reference"](build)
    if build().traits.causal:
        ITEMS["partitions"](build)
    with pytest.raises(AssertionError, match="forward against the formula by hand: differs"):
        ITEMS["by_hand"](build)


def state_bytes_forget_the_tail(patch: Patch) -> None:
    """The cost leaves out the carried rows."""
    patch.setattr(convolution.QKVConv, "state_bytes", lambda self, batch, dtype: 0)


MUTANTS: list[tuple[Callable[[Patch], None], str, dict, str]] = [
    (shift_off_by_one, "rmha", {}, "reference"),
    (shift_off_by_one, "rcmha", {}, "reference"),
    (unmasked_corner, "rmha", {}, "causality"),
    (documents_leak, "rmha", {}, "packing"),
    (convolution_across_documents, "mdha", {}, "packing"),
    (window_of_one_less, "mha", {"window": 4}, "partitions"),
    (sinks_fall_out, "rcmha", {"window": 4, "sinks": 3}, "partitions"),
    (streamed_mask_of_the_chunk, "rmha", {}, "partitions"),
    (convolution_without_state, "rcmha", {}, "partitions"),
    (convolution_without_state, "mdha", {}, "partitions"),
    (tail_of_padding, "rcmha", {}, "unequal_batch"),
    (one_conv_tail_for_all, "mdha", {}, "partitions"),
    (rotation_restarts, "mha", {}, "partitions"),
    (rotation_in_low_precision, "mha", {}, "shift"),
    (cache_counts_padding, "mha", {}, "unequal_batch"),
    (cache_forgets_growth, "mha", {}, "partitions"),
    (sinusoids_of_the_wrong_sign, "rmha", {"position": "sinusoid"}, "reference"),
    (linear_chunk_memory_undecayed, "linear", {}, "partitions"),
    (
        linear_reads_before_it_writes,
        "linear",
        {"normalise": False, "decay": False, "feature_map": "identity"},
        "reference",
    ),
    (state_bytes_forget_the_tail, "rcmha", {}, "cost"),
    (mesa_forgets_its_sums, "mesa", {}, "partitions"),
    (mesa_documents_leak, "mesa", {}, "packing"),
    (query_is_read, "in_context_linear", {}, "reference"),
    (query_is_read, "softmax_regression", {}, "reference"),
]


@pytest.mark.parametrize(
    ("mutate", "kind", "options", "item"), MUTANTS, ids=[f"{m[0].__name__}-{m[1]}" for m in MUTANTS]
)
def test_mutant_dies_where_it_should(mutate, kind, options, item, monkeypatch):
    """The item written for this mistake catches it, not only some other one."""
    assert (kind, options) in all_cases()  # unbroken it keeps the contract, as test_contract shows
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        ITEMS[item](functools.partial(build_case, kind, options))


def test_the_whole_contract_asks_every_item(monkeypatch):
    build, asked = functools.partial(build_case, "mha", {}), []
    for name in ITEMS:
        monkeypatch.setitem(ITEMS, name, lambda build, name=name: asked.append((name, build)))
    verify_contract(build)
    assert asked == [(name, build) for name in ITEMS]
