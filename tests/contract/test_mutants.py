"""Broken variants must not pass: each mutant is one plausible mistake, and the contract has to notice it."""

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.attention.parts import mixing, token_mixing
from attnzoo.kvcache import full
from attnzoo.ops.linear_attention import torch as linear_torch
from attnzoo.ops.relative_sdpa import torch as relative_torch
from attnzoo.ops.rope import torch as rope_torch
from attnzoo.ops.sinusoid_sdpa import torch as sinusoid_torch
from tests.contract.contract import ITEMS, build_case, verify_contract

Patch = pytest.MonkeyPatch


def shift_off_by_one(patch: Patch) -> None:
    """Every distance reads the row of its neighbour."""
    right = relative_torch._aligned_bias

    def wrong(q: Tensor, table: Tensor, table_bias: Tensor, scale: float) -> Tensor:
        return right(q, table.roll(1, dims=1), table_bias.roll(1, dims=1), scale)

    patch.setattr(relative_torch, "_aligned_bias", wrong)


def unmasked_corner(patch: Patch) -> None:
    """What the shift wraps around into the upper triangle stays visible."""

    def wrong(q: Tensor, table: Tensor, table_bias: Tensor, scale: float) -> Tensor:
        batch, heads, tokens, _ = q.shape
        rows = torch.arange(tokens - 1, -1, -1).clamp(max=table_bias.shape[-1] - 1)
        logits = relative_torch._distance_logits(q, table[:, rows], table_bias[:, rows], scale)
        return F.pad(logits, (1, 0)).view(batch, heads, tokens + 1, tokens)[:, :, 1:]

    patch.setattr(relative_torch, "_aligned_bias", wrong)


def streamed_mask_of_the_chunk(patch: Patch) -> None:
    """The table is read for any distance, but hidden keys are not hidden while streaming."""
    patch.setattr(relative_torch, "causal_mask", lambda queries, keys: keys[:, :, None, :] >= -1)


def convolution_without_state(patch: Patch) -> None:
    """Each chunk is convolved as if it were the start of the sequence."""
    right = token_mixing.depthwise_conv

    def wrong(x: Tensor, kernel: Tensor, *, tail_BWNH: Tensor | None = None, **rest: object) -> Tensor:
        return right(x, kernel, **rest)

    patch.setattr(token_mixing, "depthwise_conv", wrong)


def tail_of_padding(patch: Patch) -> None:
    """The carried rows are the last rows of the chunk, padding included."""
    patch.setattr(token_mixing, "_next_tail", lambda tail, x, counts: torch.cat([tail, x], dim=1)[:, -tail.shape[1] :])


def one_conv_tail_for_all(patch: Patch) -> None:
    """The value convolution continues with the key's rows."""
    right = token_mixing.QKVConv.extend

    def wrong(self, qkv, state, counts_B):
        mixed = token_mixing.QKVConvState(state.query, state.key, state.key)
        return right(self, qkv, mixed, counts_B)

    patch.setattr(token_mixing.QKVConv, "extend", wrong)


def rotation_restarts(patch: Patch) -> None:
    """Rotary positions count from the start of the chunk."""
    right = mixing.SoftmaxMixing.extend

    def wrong(self, qkv, state, positions_BT, counts_B):
        q, k, v = qkv
        chunk_BT = positions_BT - positions_BT[:, :1]
        q, k = self.position.encode(q, k, chunk_BT, "auto")
        patch.setattr(type(self.position), "encode", lambda _, q, k, positions, impl: (q, k))
        return right(self, (q, k, v), state, positions_BT, counts_B)

    patch.setattr(mixing.SoftmaxMixing, "extend", wrong)


def rotation_in_low_precision(patch: Patch) -> None:
    """Angles lose their phase in bfloat16."""
    patch.setattr(rope_torch, "accumulation_dtype", lambda dtype: dtype)


def cache_counts_padding(patch: Patch) -> None:
    """Padding of a short row enters its cache."""
    right = full.FullCache.append

    def wrong(self, state, keys, values, positions_BT, counts_B):
        return right(self, state, keys, values, positions_BT, None)

    patch.setattr(full.FullCache, "append", wrong)


def cache_forgets_growth(patch: Patch) -> None:
    """A cache that outgrows its room loses what it held."""
    right = full._with_room

    def wrong(buffer: Tensor, used: int, new: Tensor) -> Tensor:
        grown = right(buffer, used, new)
        return grown if grown.shape == buffer.shape else torch.zeros_like(grown)

    patch.setattr(full, "_with_room", wrong)


def sinusoids_of_the_wrong_sign(patch: Patch) -> None:
    """r_{j-i} in place of r_{i-j}."""
    right = sinusoid_torch._angles

    def wrong(positions: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        sin, cos = right(positions, width, dtype)
        return -sin, cos

    patch.setattr(sinusoid_torch, "_angles", wrong)


def linear_chunk_memory_undecayed(patch: Patch) -> None:
    """Between chunks the memory does not decay."""
    right = linear_torch._one_chunk

    def wrong(q, k, v, log_decay, memory, real):
        out, after = right(q, k, v, log_decay, memory, real)
        decayed = (log_decay * real[:, None]).exp()[..., None, None] * memory
        return out, after - decayed + memory

    patch.setattr(linear_torch, "_one_chunk", wrong)


def linear_reads_before_it_writes(patch: Patch) -> None:
    """A query does not see its own key."""
    right = linear_torch.linear_attention_torch

    def wrong(q, k, v, decay, memory, counts, normalise):
        late_k, late_v = F.pad(k, (0, 0, 1, -1)), F.pad(v, (0, 0, 1, -1))
        return right(q, late_k, late_v, decay, memory, counts, normalise)

    patch.setattr("attnzoo.ops.linear_attention.linear_attention_torch", wrong)


def state_bytes_forget_the_tail(patch: Patch) -> None:
    """The cost leaves out the carried rows."""
    patch.setattr(token_mixing.QKVConv, "state_bytes", lambda self, batch, dtype: 0)


MUTANTS: list[tuple[Callable[[Patch], None], str, dict, str]] = [
    (shift_off_by_one, "rmha", {}, "reference"),
    (shift_off_by_one, "rcmha", {}, "reference"),
    (unmasked_corner, "rmha", {}, "causality"),
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
    (linear_reads_before_it_writes, "linear", {"normalise": False}, "reference"),
    (state_bytes_forget_the_tail, "rcmha", {}, "cost"),
]


@pytest.mark.parametrize(
    ("mutate", "kind", "options", "item"), MUTANTS, ids=[f"{m[0].__name__}-{m[1]}" for m in MUTANTS]
)
def test_mutant_dies(mutate, kind, options, item, monkeypatch):
    build = functools.partial(build_case, kind, options)
    verify_contract(build)
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        verify_contract(build)


@pytest.mark.parametrize(
    ("mutate", "kind", "options", "item"), MUTANTS, ids=[f"{m[0].__name__}-{m[1]}" for m in MUTANTS]
)
def test_mutant_dies_where_it_should(mutate, kind, options, item, monkeypatch):
    """The item written for this mistake catches it, not only some other one."""
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        ITEMS[item](functools.partial(build_case, kind, options))
