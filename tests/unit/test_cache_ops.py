"""Operations of compressed caches: torch against the reference, the formulas by hand, and what is refused."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnzoo.ops.accumulated_attention import Tables, accumulated_attention
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.evict_merge import Arrival, MergeRule, Slots, evict_merge, evict_merge_step
from attnzoo.ops.paged_decode import Entries, paged_decode
from attnzoo.ops.sdpa import sdpa

H = 6


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def chosen(batch: int, kv_heads: int, width: int, seed: int = 0) -> Tensor:
    """Channels of each kv head, ascending."""
    generator = torch.Generator().manual_seed(seed)
    picks = [torch.randperm(H, generator=generator)[:width].sort().values for _ in range(batch * kv_heads)]
    return torch.stack(picks).view(batch, kv_heads, width)


def holes(batch: int, kv_heads: int, slots: int, highest: int, seed: int = 0) -> Tensor:
    """Positions in no order, some of them empty; slot 0 is always seen."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(-1, highest, (batch, kv_heads, slots), generator=generator)
    return positions.index_fill(2, torch.tensor([0]), 0) if slots else positions


def segment(batch: int, kv_heads: int, slots: int, *, width: int = H, seed: int = 0, **rest: Tensor) -> Entries:
    positions = rest.pop("positions", None)
    return Entries(
        keys_BKSC=rand(batch, kv_heads, slots, width, seed=seed),
        values_BKSV=rand(
            batch,
            kv_heads,
            slots,
            rest["value_channels_BKV"].shape[2] if rest.get("value_channels_BKV") is not None else H,
            seed=seed + 1,
        ),
        positions_BKS=holes(batch, kv_heads, slots, 30, seed) if positions is None else positions,
        **rest,
    )


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    tokens=st.integers(1, 3),
    prefix=st.integers(0, 7),
    tail=st.integers(1, 5),
    width=st.integers(1, H),
    merge_counts=st.booleans(),
    seed=st.integers(0, 99),
)
def test_paged_decode_is_its_reference(batch, kv_heads, groups, tokens, prefix, tail, width, merge_counts, seed):
    shape = (batch, kv_heads, prefix)
    part = segment(
        *shape,
        width=width,
        seed=seed,
        channels_BKC=chosen(batch, kv_heads, width, seed),
        value_channels_BKV=chosen(batch, kv_heads, 4, seed) if merge_counts else None,
        log_counts_BKS=rand(*shape).abs() if merge_counts else None,
    )
    queries = 20 + torch.arange(tokens).expand(batch, tokens) + torch.arange(batch)[:, None]
    last = segment(batch, kv_heads, tail, seed=seed + 5, positions=holes(batch, 1, tail, 21, seed))
    heads = kv_heads * groups
    rest = {
        "query_positions_BT": queries,
        "bias_BNTS": rand(batch, heads, tokens, prefix + tail, seed=3),
        "probe_BKC": rand(batch, kv_heads, width, seed=4),
        "accumulated_attention": True,
    }
    q = rand(batch, heads, tokens, H, seed=seed)
    expected, actual = (paged_decode(q, part, last, impl=impl, **rest) for impl in ("reference", "torch"))
    for name in ("out_BNTH", "accumulated_BKS", "dots_BKP"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=0, atol=1e-11)
    torch.testing.assert_close(
        actual.accumulated_BKS.sum(-1), torch.full((batch, kv_heads), float(groups * tokens)).double()
    )


def test_paged_decode_with_all_channels_is_attention():
    part, last = segment(2, 2, 5), segment(2, 2, 3, seed=7)
    q, queries = rand(2, 4, 2, H), torch.tensor([[20, 21], [25, 26]])
    keys, values, positions = (
        torch.cat([getattr(part, n), getattr(last, n)], dim=2) for n in ("keys_BKSC", "values_BKSV", "positions_BKS")
    )
    mask = Mask(query_positions_BT=queries, key_positions_BKS=positions)
    out = paged_decode(q, part, last, query_positions_BT=queries).out_BNTH
    torch.testing.assert_close(out, sdpa(q, keys, values, mask=mask, impl="reference"), rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_a_query_that_sees_no_entry_gets_zeros(impl):
    """Beside one that sees some; its weights are zeros, too."""
    nowhere = torch.tensor([[[0, 3, 1]], [[-1, 9, -1]]])
    parts = (segment(2, 1, 3, positions=nowhere), segment(2, 1, 3, seed=7, positions=nowhere))
    out = paged_decode(
        rand(2, 2, 1, H), *parts, query_positions_BT=torch.tensor([[4], [8]]), accumulated_attention=True, impl=impl
    )
    assert torch.equal(out.out_BNTH[1], torch.zeros(2, 1, H).double())
    assert torch.equal(out.accumulated_BKS[1], torch.zeros(1, 6).double())
    torch.testing.assert_close(out.accumulated_BKS[0].sum(), torch.tensor(2.0).double())


@pytest.mark.parametrize(
    ("mask", "named"),
    [
        (Mask(causal=False), "causal=False"),
        (Mask(starts_BT=torch.zeros(1, 2, dtype=torch.int64)), "starts_BT"),
        (Mask(prefix_B=torch.ones(1).long(), keys_BS=torch.ones(1, 2, dtype=torch.bool)), "prefix_B and keys_BS"),
        (Mask(pairs=torch.ones(1, 2, 2, dtype=torch.bool)), "pairs"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_accumulated_attention_refuses_masks_that_no_cache_has(mask, named):
    with pytest.raises(ValueError, match=f"takes causal masks with window, sinks and positions, and not {named}"):
        accumulated_attention(rand(1, 2, 2, H), rand(1, 1, 2, H), mask=mask)


def test_scale_keeps_the_full_head_dim():
    """One kept channel of four, k = (2), q = (3, ., ., .): the logit is 3 * 2 / sqrt(4) = 3, against 0 of the tail."""
    keys = torch.tensor([2.0]).view(1, 1, 1, 1)
    part = Entries(
        keys_BKSC=keys,
        values_BKSV=torch.tensor([[[[1.0, 0, 0, 0]]]]),
        positions_BKS=torch.zeros(1, 1, 1, dtype=torch.long),
        channels_BKC=torch.tensor([[[2]]]),
    )
    last = Entries(
        keys_BKSC=torch.zeros(1, 1, 1, 4),
        values_BKSV=torch.tensor([[[[0.0, 1, 0, 0]]]]),
        positions_BKS=torch.ones(1, 1, 1, dtype=torch.long),
    )
    q = torch.tensor([[[[7.0, 7, 3, 7]]]])
    for impl in ("reference", "torch"):
        out = paged_decode(q, part, last, query_positions_BT=torch.ones(1, 1).long(), impl=impl).out_BNTH
        first = math.exp(3) / (math.exp(3) + 1)
        torch.testing.assert_close(out.flatten(), torch.tensor([first, 1 - first, 0, 0]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("merge_counts", [False, True])
def test_entries_without_positions_are_all_seen(impl, merge_counts):
    """As entries at positions that no query is before."""
    options = {"log_counts_BKS": rand(2, 2, 5).abs()} if merge_counts else {}
    part, last = segment(2, 2, 5, positions=torch.full((2, 2, 5), 3), **options), segment(2, 2, 3, seed=7)
    rest = {"query_positions_BT": torch.tensor([[20, 21], [25, 26]]), "accumulated_attention": True, "impl": impl}
    q = rand(2, 4, 2, H)
    right = paged_decode(q, part, last, **rest)
    bare = paged_decode(q, replace(part, positions_BKS=None), last, **rest)
    assert torch.equal(bare.out_BNTH, right.out_BNTH)
    assert torch.equal(bare.accumulated_BKS, right.accumulated_BKS)


def test_votes_weigh_as_many_equal_entries():
    """An entry with three merge counts gives what three equal entries give."""
    one, last = segment(1, 1, 1, positions=torch.zeros(1, 1, 1).long()), segment(1, 1, 2, seed=9)
    three = Entries(
        keys_BKSC=one.keys_BKSC.expand(-1, -1, 3, -1),
        values_BKSV=one.values_BKSV.expand(-1, -1, 3, -1),
        positions_BKS=torch.arange(3).view(1, 1, 3),
    )
    voted = Entries(
        keys_BKSC=one.keys_BKSC,
        values_BKSV=one.values_BKSV,
        positions_BKS=one.positions_BKS,
        log_counts_BKS=torch.tensor([[[math.log(3)]]], dtype=torch.float64),
    )
    q, at = rand(1, 2, 1, H), torch.tensor([[40]])
    outs = [paged_decode(q, part, last, query_positions_BT=at).out_BNTH for part in (voted, three)]
    torch.testing.assert_close(*outs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_positions_BT": torch.zeros(1, 3).long()}, "query_positions_BT"),
        ({"bias_BNTS": torch.zeros(1, 2, 1, 9)}, "bias_BNTS"),
        ({"probe_BKC": torch.zeros(1, 1, 5)}, "in the prefix's channels"),
        ({"prefix": None, "probe_BKC": torch.zeros(1, 1, 6)}, "there is no prefix"),
        ({"prefix": segment(1, 1, 3, width=4)}, "say which channels they are"),
    ],
)
def test_paged_decode_refuses_what_does_not_fit(change, message):
    values = {"prefix": segment(1, 1, 3), "query_positions_BT": torch.zeros(1, 1).long()} | change
    prefix = values.pop("prefix")
    with pytest.raises(ValueError, match=message):
        paged_decode(rand(1, 2, 1, H), prefix, segment(1, 1, 2), **values)


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    tokens=st.integers(1, 6),
    slots=st.integers(1, 7),
    channels=st.sampled_from([None, 0, H]),
    seed=st.integers(0, 99),
)
def test_accumulated_attention_is_its_reference(batch, kv_heads, groups, tokens, slots, channels, seed):
    """Without relative terms, with a bias by distance alone, and with a table."""
    heads, relative = kv_heads * groups, channels is not None
    tables = None
    if channels is not None:
        tables = Tables(rand(heads, H, seed=1), rand(heads, 4, channels, seed=2), rand(heads, 4, seed=3))
    queries = 9 + torch.arange(tokens).expand(batch, tokens) + 3 * torch.arange(batch)[:, None]
    mask = Mask(query_positions_BT=queries, key_positions_BKS=holes(batch, kv_heads, slots, 12, seed))
    rest = {
        "mask": mask,
        "counts_B": torch.arange(batch) + tokens - batch + 1 if tokens >= batch else None,
        "tables": tables,
        "log_counts_BKS": rand(batch, kv_heads, slots).abs() if relative else None,
    }
    q, k = rand(batch, heads, tokens, H, seed=seed), rand(batch, kv_heads, slots, H, seed=seed + 1)
    expected, actual = (accumulated_attention(q, k, impl=impl, **rest) for impl in ("reference", "torch"))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)


def test_accumulated_attention_by_blocks_of_the_parallel_form(monkeypatch):
    """Blocks of two rows, one sequence at a time; the columns of equal scores are 1, 1/2, ... summed."""
    from attnzoo.ops.accumulated_attention import torch as fast

    monkeypatch.setattr(fast, "ROWS", 2)
    monkeypatch.setattr(fast, "BLOCK_BYTES", 1)
    accumulated = accumulated_attention(torch.zeros(2, 1, 3, H), torch.zeros(2, 1, 3, H))
    assert accumulated[1, 0].tolist() == pytest.approx([1 + 1 / 2 + 1 / 3, 1 / 2 + 1 / 3, 1 / 3])


RULES = [
    MergeRule(kind="drop"),
    MergeRule(),
    MergeRule(kind="official", beta=0.5),
    MergeRule(together=True),
    MergeRule(kind="official", beta=0.5, together=True),
]


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 3),
    slots=st.integers(2, 8),
    rule=st.sampled_from(RULES),
    merge_counts=st.booleans(),
    known=st.booleans(),
    seed=st.integers(0, 999),
)
def test_evict_merge_is_its_reference(batch, kv_heads, slots, rule, merge_counts, known, seed):
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(0, 3, (batch, kv_heads, slots), generator=generator)
    if rule.together:  # as many evicted a kv head, not the same ones
        turns = torch.rand(batch, kv_heads, slots, generator=generator).argsort(-1)
        kinds = kinds[:, :1].expand(-1, kv_heads, -1).gather(-1, turns)
    keys, values = rand(batch, kv_heads, slots, H, seed=seed), rand(batch, kv_heads, slots, 3, seed=seed + 1)
    rest = {
        "keep_BKS": kinds == 0,
        "evict_BKS": kinds == 1,
        "slots": slots,
        "rule": rule,
        "threshold_BK": torch.full((batch, kv_heads), 0.2 if known else math.nan).double(),
        "merge_counts_BKS": rand(batch, kv_heads, slots).abs() + 1 if merge_counts else None,
    }
    expected, actual = (evict_merge(keys, values, impl=impl, **rest) for impl in ("reference", "torch"))
    assert torch.equal(actual.source_BKM, expected.source_BKM)
    for name in ("keys_BKMC", "values_BKMV", "merge_counts_BKM", "threshold_BK"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=0, atol=1e-11, equal_nan=True)
    if merge_counts and rule.kind != "drop":
        held = (rest["merge_counts_BKS"] * (kinds == 0)).sum(-1)
        assert (actual.merge_counts_BKM.sum(-1) >= held - 1e-9).all()


@settings(max_examples=40, deadline=None)
@given(
    kv_heads=st.integers(1, 3),
    slots=st.integers(1, 6),
    rule=st.sampled_from(RULES),
    merge_counts=st.booleans(),
    seed=st.integers(0, 999),
)
def test_evict_merge_step_is_its_reference(kv_heads, slots, rule, merge_counts, seed):
    batch, generator = 2, torch.Generator().manual_seed(seed)
    keys = rand(batch, kv_heads, slots, H, seed=seed)
    lengths = keys.norm(dim=-1)
    norms = lengths * (torch.rand(batch, kv_heads, slots, generator=generator) > 0.2)
    victims = torch.randint(-1, slots, (batch, kv_heads), generator=generator)
    place = victims.clamp(min=0)[..., None]
    norms.scatter_(-1, place, lengths.gather(-1, place))  # what leaves was there
    arrival = Arrival(
        key_BKC=rand(batch, kv_heads, H, seed=5),
        value_BKV=rand(batch, kv_heads, 3, seed=6),
        slot_BK=torch.where(victims >= 0, victims, torch.randint(-1, slots, (batch, kv_heads), generator=generator)),
    )
    dots = (keys.gather(2, victims.clamp(min=0)[..., None, None].expand(-1, -1, 1, H)) @ keys.mT)[:, :, 0]
    threshold = rand(batch, kv_heads, seed=seed + 3) * 0.3
    threshold[0] = math.nan
    results = []
    for impl in ("reference", "torch"):
        state = Slots(
            keys_BKPC=keys.clone(),
            values_BKPV=rand(batch, kv_heads, slots, 3, seed=seed + 1),
            norms_BKP=norms.clone(),
            merge_counts_BKP=rand(batch, kv_heads, slots, seed=seed + 2).abs() + 1 if merge_counts else None,
        )
        rest = {"victim_BK": victims, "dots_BKP": dots, "arrival": arrival, "rule": rule, "threshold_BK": threshold}
        out = evict_merge_step(state, impl=impl, **rest)
        results.append([out, state.keys_BKPC, state.values_BKPV, state.norms_BKP, state.merge_counts_BKP])
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11, equal_nan=True)


def test_merge_by_hand():
    """Kept k_0 = (1, 0) and k_3 = (0, 1); evicted k_1 = (3, 4) and k_2 = (2, 0).

    u_1 = max(3/5, 4/5) = 0.8 to k_3, u_2 = max(1, 0) = 1 to k_0; the threshold is their mean 0.9, so only k_2 merges:
    with exp(1) for both it meets k_0 halfway, (1.5, 0), and the values (10, 0) and (20, 0) at (15, 0).
    """
    keys = torch.tensor([[1.0, 0], [3, 4], [2, 0], [0, 1]]).double().view(1, 1, 4, 2)
    values = torch.tensor([[10.0, 0], [1, 1], [20, 0], [0, 30]]).double().view(1, 1, 4, 2)
    keep = torch.tensor([[[True, False, False, True]]])
    rest = {"keep_BKS": keep, "evict_BKS": ~keep, "slots": 2, "merge_counts_BKS": torch.ones(1, 1, 4).double()}
    new = {"threshold_BK": torch.full((1, 1), math.nan).double()}
    for impl in ("reference", "torch"):
        merged = evict_merge(keys, values, rule=MergeRule(), impl=impl, **rest, **new)
        assert merged.threshold_BK.item() == pytest.approx(0.9)
        assert merged.source_BKM.tolist() == [[[0, 3]]]
        torch.testing.assert_close(merged.keys_BKMC[0, 0], torch.tensor([[1.5, 0], [0, 1]]).double())
        torch.testing.assert_close(merged.values_BKMV[0, 0], torch.tensor([[15.0, 0], [0, 30]]).double())
        assert merged.merge_counts_BKM.tolist() == [[[2.0, 1.0]]]
        # With a threshold of 0.5 before: 0.7 * max(0.8, 1) + 0.3 * 0.5 = 0.85 (paper), and with the authors' rule
        # 0.5 * 0.9 + 0.5 * 0.5 = 0.7: both merge, k_3 <- ((0, 1) + 0.8 (3, 4)) / 2 = (1.2, 2.1).
        before = {"threshold_BK": torch.full((1, 1), 0.5).double()}
        assert evict_merge(keys, values, rule=MergeRule(), impl=impl, **rest, **before).threshold_BK.item() == (
            pytest.approx(0.85)
        )
        official = evict_merge(keys, values, rule=MergeRule(kind="official", beta=0.5), impl=impl, **rest, **before)
        assert official.threshold_BK.item() == pytest.approx(0.7)
        torch.testing.assert_close(official.keys_BKMC[0, 0, 1], torch.tensor([1.2, 2.1]).double())


def test_equal_entries_merge_exactly():
    """Weights sum to one: entries that are all alike merge into themselves."""
    keys = torch.tensor([0.5, -2.0]).double().expand(1, 1, 5, 2)
    keep = torch.tensor([[[False, True, False, False, False]]])
    for rule in RULES[1:3]:
        merged = evict_merge(
            keys,
            keys,
            keep_BKS=keep,
            evict_BKS=~keep,
            slots=1,
            rule=rule,
            threshold_BK=torch.full((1, 1), math.nan).double(),
        )
        torch.testing.assert_close(merged.keys_BKMC[0, 0, 0], keys[0, 0, 0], rtol=0, atol=1e-14)


def test_too_few_slots_are_refused():
    keep = torch.ones(1, 1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="slots=2 cannot hold the 3 entries"):
        evict_merge(
            rand(1, 1, 3, H),
            rand(1, 1, 3, H),
            keep_BKS=keep,
            evict_BKS=~keep,
            slots=2,
            rule=MergeRule(),
            threshold_BK=torch.zeros(1, 1).double(),
        )
