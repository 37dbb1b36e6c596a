"""The kernels of compressed caches in Triton's interpreter; the checks are those of tests/helpers/cache_kernels.py."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from attnzoo.ops.accumulated_attention import accumulated_attention
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.evict_merge import MergeRule, evict_merge, evict_merge_step
from attnzoo.ops.paged_decode import paged_decode
from attnzoo.ops.paged_decode.splits import Splits, plan_splits
from tests.helpers.cache_kernels import (
    DECODE_CASES,
    MASS_CASES,
    RULES,
    check_decode,
    check_mass,
    check_merge,
    check_pages,
    check_step,
    decode_inputs,
    flat,
    mass_inputs,
    merge_inputs,
    moved,
    named,
    run_decode,
    step_inputs,
)
from tests.helpers.conv_linear_kernels import assert_same, interpreted

pytest.importorskip("triton", reason="the package triton is not installed")

FP32, BF16 = torch.float32, torch.bfloat16
"""What the kernels compute is seen in float32; that they load, widen and round the lower one, in one case of each."""


@interpreted
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, FP32) for name in DECODE_CASES), ("thin keys and values, all options", BF16)], ids=str
)
def test_paged_decode(name, dtype):
    check_decode(*DECODE_CASES[name], "cpu", dtype, (16, 1))


@interpreted
@pytest.mark.parametrize("splits", [None, (16, 2), (32, 1)])
def test_how_the_context_is_split_changes_nothing(splits):
    check_decode(*DECODE_CASES["thin keys and values, all options"], "cpu", torch.float32, splits)


@interpreted
def test_more_splits_than_are_combined_at_once(monkeypatch):
    from attnzoo.ops.paged_decode import launch as launches

    monkeypatch.setattr(launches, "COMBINED", 2)
    check_decode(*DECODE_CASES["thin keys"], "cpu", torch.float32, (16, 1))


@interpreted
def test_chosen_by_impl():
    inputs = {name: moved(x, "cpu", torch.float32) for name, x in decode_inputs(*DECODE_CASES["thin keys"]).items()}
    q, prefix, tail = (inputs.pop(name) for name in ("q_BNTH", "prefix", "tail"))
    decoded = [paged_decode(q, prefix, tail, impl=impl, **inputs) for impl in ("triton", "torch")]
    assert_same(*map(named, decoded), 1e-5)


@interpreted
def test_views_of_buffers_and_what_empty_slots_hold():
    """Keys and values are views of larger buffers, and no number of an empty or later slot is read."""
    inputs = {name: moved(x, "cpu", torch.float32) for name, x in decode_inputs(*DECODE_CASES["thin keys"]).items()}
    expected = run_decode(inputs, (16, 1))
    for name in ("prefix", "tail"):
        part, hidden = inputs[name], {}
        unseen = ((part.positions_BKS < 0) | (part.positions_BKS > 40))[..., None]
        for what in ("keys_BKSC", "values_BKSV"):
            x = getattr(part, what)
            buffer = torch.full((x.shape[0], x.shape[1], x.shape[2] + 7, x.shape[3] + 3), math.nan)
            buffer[:, :, : x.shape[2], : x.shape[3]] = x.masked_fill(unseen, math.nan)
            hidden[what] = buffer[:, :, : x.shape[2], : x.shape[3]]
        inputs[name] = dataclasses.replace(part, **hidden)
    assert_same(named(run_decode(inputs, (16, 1))), named(expected), 0.0)


@interpreted
@pytest.mark.parametrize("page", [16, 5])
def test_pages_are_contiguous_rows(page):
    check_pages("cpu", torch.float32, (2, 2, 2, 1, 37, 19, 5, 3, 5), page, (16, 1))


@interpreted
def test_query_that_sees_nothing_gets_zeros():
    inputs = {name: moved(x, "cpu", torch.float32) for name, x in decode_inputs(*DECODE_CASES["plain"]).items()}
    inputs["query_positions_BT"] = torch.tensor([[-1], [40]])
    out = run_decode(inputs, (16, 1)).out_BNTH
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert (out[1] != 0).all()


def test_splits_share_out_blocks():
    assert plan_splits(100, 28, rows=3, multiprocessors=132) == Splits(blocks=2, prefix=50, tail=14)
    assert plan_splits(100, 28, rows=132 * 4, multiprocessors=132) == Splits(blocks=128, prefix=1, tail=1)
    assert plan_splits(0, 1, rows=1, multiprocessors=1) == Splits(blocks=2, prefix=0, tail=1)
    for prefix, tail, rows in ((7, 3, 5), (1000, 1, 17), (0, 129, 3)):
        plan = plan_splits(prefix, tail, rows=rows, multiprocessors=10)
        assert plan.prefix * plan.blocks >= prefix > (plan.prefix - 1) * plan.blocks
        assert plan.tail * plan.blocks >= tail > (plan.tail - 1) * plan.blocks
        assert plan.total * rows <= 10 * 4 + 2 * rows


@interpreted
@pytest.mark.parametrize(("name", "dtype"), [*((name, FP32) for name in MASS_CASES), ("tables", BF16)], ids=str)
def test_accumulated_attention(name, dtype):
    check_mass(*MASS_CASES[name], "cpu", dtype, 16)


@interpreted
def test_accumulated_attention_chosen_by_impl():
    given = mass_inputs(*MASS_CASES["holes and counts"], "cpu", torch.float32)
    q, k = given.pop("q_BNTH"), given.pop("k_BKSH")
    masses = [{"accumulated": accumulated_attention(q, k, impl=impl, **given)} for impl in ("triton", "torch")]
    assert_same(*masses, 1e-5)


@interpreted
def test_accumulated_attention_by_parts_of_the_queries(monkeypatch):
    """Where tables ask for logits by distance, only so many queries as LOGITS_BYTES allow are dealt with at once."""
    from attnzoo.ops.accumulated_attention import launch as kernels

    monkeypatch.setattr(kernels, "LOGITS_BYTES", 1)
    check_mass(*MASS_CASES["tables"], "cpu", torch.float32, 16)


@pytest.mark.parametrize("offset", range(20))
def test_blocks_that_see_each_other(offset):
    """Where positions ascend neither a block too many nor one too few is visited, wherever the queries begin."""
    from attnzoo.ops.accumulated_attention.launch import visible_blocks

    queries_BT, keys_BKS = torch.arange(19)[None] + offset, torch.arange(42)[None, None]
    reach_BKI, begins_BKJ = visible_blocks(queries_BT, keys_BKS, 4, 5)
    padded = torch.nn.functional.pad(keys_BKS[0, 0] <= queries_BT[0, :, None], (0, 3, 0, 1))
    sees_IJ = padded.unflatten(1, (-1, 5)).unflatten(0, (-1, 4)).any(-1).any(1)
    assert torch.equal(reach_BKI[0, 0], sees_IJ.sum(1, dtype=torch.int32))
    assert torch.equal(begins_BKJ[0, 0], (~sees_IJ).sum(0, dtype=torch.int32))


@interpreted
def test_accumulated_attention_with_known_sums_of_rows():
    """What the forward pass of attention left, log2 of each row's sum, saves the first pass and changes nothing."""
    from attnzoo.ops.accumulated_attention.triton import accumulated_attention_triton

    given = mass_inputs(*MASS_CASES["parallel"], "cpu", torch.float32)
    q, k = given["q_BNTH"], given["k_BKSH"]
    scores = (q.unflatten(1, (2, -1)) @ k[:, :, None].mT).flatten(1, 2) * 5**-0.5
    scores = scores.masked_fill(torch.ones(35, 35).triu(1).bool(), -math.inf)
    sums = scores.logsumexp(-1) / math.log(2)
    masses = [{"accumulated": accumulated_attention_triton(*given.values(), 5**-0.5, x, 16)} for x in (sums, None)]
    assert_same(*masses, 1e-5)
    assert (
        accumulated_attention_triton(*given.values(), 5**-0.5, sums + 1, 16) / masses[0]["accumulated"] - 0.5
    ).abs().max() < 1e-5


def test_accumulated_attention_is_never_tokens_by_tokens():
    """What the kernels are given, inputs and scratch alike, grows with T, not with T x T."""
    from attnzoo.ops.accumulated_attention.launch import Buffers, launches

    def numbers(tokens: int) -> int:
        q, k = (torch.empty(1, n, tokens, 64, dtype=torch.bfloat16, device="meta") for n in (4, 2))
        accumulated = torch.empty(1, 2, tokens, device="meta")
        done = launches(q, k, Mask(), None, None, None, 0.125, Buffers(accumulated_BKS=accumulated, gpu="sm_90"))
        arguments = [x for launch in done for argument in launch.arguments.values() for x in flat(argument)]
        return max(x.numel() for x in arguments if isinstance(x, Tensor))

    assert numbers(65536) == 2 * numbers(32768) == 4 * 65536 * 64


MERGES = [(rule, counts, FP32) for rule in RULES for counts in (False, True)] + [("paper", True, BF16)]


@interpreted
@pytest.mark.parametrize(("rule", "merge_counts", "dtype"), MERGES, ids=str)
def test_evict_merge(rule, merge_counts, dtype):
    check_merge((2, 2, 53, 5, 3), RULES[rule], merge_counts, "cpu", dtype, 16)


@interpreted
def test_nothing_evicted_is_copied():
    given = merge_inputs((2, 2, 11, 5, 3), MergeRule(), True, "cpu", torch.float32)
    given["evict_BKS"] = torch.zeros_like(given["evict_BKS"])
    keys, values = given.pop("keys_BKSC"), given.pop("values_BKSV")
    merged = evict_merge(keys, values, impl="triton", **given)
    index = merged.source_BKM.clamp(min=0)[..., None]
    held = (merged.source_BKM >= 0)[..., None]
    assert torch.equal(merged.keys_BKMC, keys.gather(2, index.expand(-1, -1, -1, 5)) * held)
    assert torch.equal(merged.threshold_BK.isnan(), given["threshold_BK"].isnan())


@interpreted
@pytest.mark.parametrize(("rule", "merge_counts", "dtype"), MERGES, ids=str)
def test_evict_merge_step(rule, merge_counts, dtype):
    check_step((4, 3, 21, 5, 3), RULES[rule], merge_counts, "cpu", dtype)


@interpreted
def test_a_victim_is_compared_with_all_slots(monkeypatch):
    from attnzoo.ops.evict_merge import launch as kernels

    monkeypatch.setattr(kernels, "MATCHED", 16)
    check_step((4, 2, 53, 5, 3), MergeRule(), True, "cpu", torch.float32)


@interpreted
def test_what_the_kernels_cannot_do_is_refused():
    inputs = {name: moved(x, "cpu", torch.float32) for name, x in decode_inputs(*DECODE_CASES["plain"]).items()}
    with pytest.raises(ValueError, match=r"float64.*use impl='torch'"):
        run_decode(inputs | {"q_BNTH": inputs["q_BNTH"].double()})
    with pytest.raises(ValueError, match="no gradients"):
        run_decode(inputs | {"q_BNTH": inputs["q_BNTH"].clone().requires_grad_()})
    wide = {
        name: moved(x, "cpu", torch.float32) for name, x in decode_inputs((1, 1, 1, 1, 1, 1, 257, 257, 257), {}).items()
    }
    with pytest.raises(ValueError, match="1 to 256 channels, and queries has 257"):
        run_decode(wide)
    given = mass_inputs(*MASS_CASES["parallel"], "cpu", torch.float32)
    with pytest.raises(ValueError, match=r"float64.*use impl='torch'"):
        accumulated_attention(given["q_BNTH"].double(), given["k_BKSH"], impl="triton")
    merge = merge_inputs((2, 2, 11, 5, 3), MergeRule(), False, "cpu", torch.float32)
    with pytest.raises(ValueError, match=r"values torch.float64.*use impl='torch'"):
        evict_merge(merge.pop("keys_BKSC"), merge.pop("values_BKSV").double(), impl="triton", **merge)
    step = step_inputs((4, 2, 7, 5, 3), MergeRule(), False, "cpu", torch.float32)
    state = step.pop("slots")
    strided = state.keys_BKPC.repeat_interleave(2, dim=-1)[..., ::2]
    with pytest.raises(ValueError, match="their last axis must be dense"):
        evict_merge_step(dataclasses.replace(state, keys_BKPC=strided), impl="triton", **step)


@interpreted
def test_page_tables_that_do_not_fit_are_refused():
    from attnzoo.ops.paged_decode.triton import Pages

    inputs = {name: moved(x, "cpu", torch.float32) for name, x in decode_inputs(*DECODE_CASES["plain"]).items()}
    with pytest.raises(ValueError, match=r"pages.tail_BI \(3, 1\) must be \[2, pages of a sequence\]"):
        run_decode(inputs, pages=Pages(tail_BI=torch.zeros(3, 1, dtype=torch.int32)))
    with pytest.raises(ValueError, match=r"tail: positions .* must be \[2, K or 1, 38\] for 2 pages of 19 slots"):
        run_decode(inputs, pages=Pages(tail_BI=torch.zeros(2, 2, dtype=torch.int32)))
