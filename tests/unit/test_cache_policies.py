"""Cache policies: options, budgets, scores by hand, and the mistakes that the contract must notice."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnzoo.kvcache import CACHES, build_cache, snapkv
from attnzoo.kvcache.budgets import allocate, asked_tokens, layer_weights, moments, variance
from attnzoo.kvcache.channels import best_channels, channel_scores, greedy_scores, hashed, kept_channels
from attnzoo.models import DecoderConfig, DecoderLM
from attnzoo.ops.evict_merge import MergeRule, evict_merge
from tests.contract.caches import build_model, policy_of, prompt, run


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("d20", {}, "unknown cache policy 'd20'; did you mean 'd2o'"),
        ("think", {"chanel_ratio": 0.5}, "did you mean 'channel_ratio'"),
        ("think", {"channel_ratio": 0.0}, "channel_ratio=0.0 is the part that is kept"),
        ("d2o", {"keep_ratio": 1.5}, "keep_ratio=1.5"),
        ("d2o", {"keep_ratio": 0.2, "max_tokens": 50}, "two budgets: set one"),
        ("d2o", {"max_tokens": 5}, "max_tokens=5 must be at least 6"),
        ("d2o", {"beta": 0.0}, "beta=0.0"),
        ("d2o", {"flavor": "papers"}, "cache.d2o.flavor='papers' is not one of 'paper', 'official'"),
        ("d2o+think", {"keep_ratio": 1.0}, "use the policy 'think'"),
        ("snapkv", {"pool": 4}, "pool=4 must be odd"),
        ("streaming", {"sinks": -1}, "sinks=-1"),
        ("think", {"repack_every": 0}, "repack_every=0"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_cache(name, options)


def test_names():
    assert set(CACHES) == {
        "full", "streaming", "think", "d2o", "d2o+think", "random_tokens", "random_channels", "snapkv",
    }  # fmt: skip


def test_linear_attention_and_windows_say_why():
    linear = DecoderConfig(vocab_size=9, model_dim=8, num_layers=2, attention="linear")
    with pytest.raises(ValueError, match="linear attention keeps a state of constant size"):
        DecoderLM(linear).init_state(1, 4, cache=build_cache("d2o"))
    window = DecoderConfig(vocab_size=9, model_dim=8, num_layers=2, attention={"kind": "mha", "window": 3})
    with pytest.raises(ValueError, match="window=3 keeps a constant number of tokens already"):
        DecoderLM(window).init_state(1, 4, cache=build_cache("think"))
    assert DecoderLM(window).init_state(1, 4, cache=build_cache("full")).nbytes()


def test_mixed_models_compress_the_layers_that_have_keys():
    config = DecoderConfig(vocab_size=9, model_dim=8, num_layers=4, attention=["rcmha", "linear"])
    model = DecoderLM(config).requires_grad_(False)
    tokens = torch.arange(45)[None].expand(2, -1) % 9
    state = model.init_state(2, 45, cache=build_cache("d2o", {"max_tokens": 7}))
    _, state = model.extend(tokens, state)
    before = state.nbytes()
    state = model.compress(state)
    assert state.nbytes() < before
    assert torch.isfinite(model.extend(tokens[:, :1], state)[0]).all()


def test_gradients_are_refused():
    model = build_model("gqa").requires_grad_(True)
    with pytest.raises(ValueError, match="no gradients"):
        model.extend(prompt(1, 3), model.init_state(1, 3, cache=build_cache("think")))


def test_compress_twice_is_refused():
    model = build_model("gqa")
    _, state = run(model, policy_of("d2o"), prompt(1, 20), 18)
    with pytest.raises(ValueError, match="compressed already"):
        model.compress(state)


def test_think_scores_by_hand():
    """Two query heads share a kv head. Channel 0: queries 1, 2 (head 0) and 0, 1 (head 1), squares 6; keys 1, 2,
    squares 5: 30. Channel 1: queries 1, 0 and 3, 0, squares 10; keys 1, 1, squares 2: 20. A mask a query head takes
    (1 + 4) * 5 = 25 against 1 * 2 for head 0, and 1 * 5 against 9 * 2 = 18 for head 1."""
    queries = torch.tensor([[[[1.0, 1], [2, 0]], [[0, 3], [1, 0]]]])
    keys = torch.tensor([[[[1.0, 1], [2, 1], [9, 9]]]])
    held = torch.tensor([[[True, True, False]]])
    scores = channel_scores(queries, keys, held)
    assert scores.tolist() == [[[30.0, 20.0]]]
    assert best_channels(scores, 1).tolist() == [[[0]]]


def test_think_score_is_what_a_channel_adds_to_the_products():
    queries, keys = torch.randn(1, 2, 3, 5).double(), torch.randn(1, 1, 4, 5).double()
    scores = channel_scores(queries, keys, torch.ones(1, 1, 4, dtype=torch.bool))
    for d in range(5):
        products = torch.einsum("nw,s->nws", queries[0, :, :, d], keys[0, 0, :, d])
        assert scores[0, 0, d].item() == pytest.approx(products.square().sum().item())


def test_snapkv_does_not_smooth_what_the_window_received_over_its_neighbours(monkeypatch):
    """Of 20 tokens the last 3 are the window and hold nearly all attention; 5 and 6 have what there is of it before."""
    model = build_model("gqa")

    def accumulated(queries, keys, **_):
        seen = keys.new_zeros(keys.shape[:3])
        seen[..., 5:7], seen[..., 17:] = 1.0, 50.0
        return seen

    monkeypatch.setattr(snapkv, "accumulated_attention", accumulated)
    policy = build_cache("snapkv", {"max_tokens": 7, "window": 3, "pool": 3})
    _, state = run(model, policy, prompt(1, 21), 20)
    for layer in state.layers:
        assert layer.mixing.kept.positions_BKP.sort(-1).values.tolist() == [[[4, 5, 6, 7]] * 2]


def test_greedy_removal_sees_channels_that_cancel():
    """One query (1, 1, 1); columns of keys (1, 0), (1, a), (-1, b) with a^2 = 0.1, b^2 = 0.2. Alone the channels cost
    1, 1.1 and 1.2; 0 and 1 add up to 1 + 1.1 + 2 = 4.1, and 0 and 2 nearly cancel: 1 + 1.2 - 2 = 0.2."""
    queries = torch.ones(1, 1, 1, 3).double()
    keys = torch.tensor([[[[1.0, 1, -1], [0, 0.1**0.5, 0.2**0.5]]]]).double()
    held = torch.ones(1, 1, 2, dtype=torch.bool)
    assert best_channels(channel_scores(queries, keys, held), 1).tolist() == [[[2]]]
    assert best_channels(greedy_scores(queries, keys, held), 1).tolist() == [[[1]]]


@pytest.mark.parametrize(("ratio", "kept"), [(0.6, 39), (0.5, 32), (0.4, 26), (1.0, 64), (0.01, 1)])
def test_kept_channels_is_the_papers_floor(ratio, kept):
    """H - floor((1 - ratio) 64): 64 - floor(25.6) = 39, 64 - 32, 64 - floor(38.4) = 26, 64, 64 - floor(63.36) = 1."""
    assert kept_channels(64, ratio) == kept


def test_variance_of_columns_in_two_parts_is_that_of_all():
    accumulated, held = torch.rand(2, 3, 9).double(), torch.rand(2, 3, 9) > 0.3
    first = torch.arange(9) < 4
    parts = moments(accumulated, held & first) + moments(accumulated, held & ~first)
    for b in range(2):
        for k in range(3):
            expected = accumulated[b, k][held[b, k]].var(correction=0).item()
            assert variance(parts)[b, k].item() == pytest.approx(expected)


def test_layer_weights_by_hand():
    """Variances 0, 5 and 10 become 0, 1/2 and 1, whatever their unit: weights 3 exp(-x) / sum."""
    for unit in (1.0, 1e6):
        weights = layer_weights(torch.tensor([0.0, 5, 10]).double().view(3, 1, 1) * unit, per_head=False)
        total = 1 + math.exp(-0.5) + math.exp(-1)
        assert weights[:, 0].tolist() == pytest.approx([3 * x / total for x in (1, math.exp(-0.5), math.exp(-1))])


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 5.0), min_size=1, max_size=7),
    low=st.integers(0, 5),
    span=st.integers(0, 40),
    share=st.floats(0.0, 1.0),
)
def test_budgets_sum_to_what_was_asked(weights, low, span, share):
    """Within the bounds, exactly; more weight never gets less, up to the rounding of one token."""
    layers, high = len(weights), low + span
    total = round(layers * low + share * layers * span)
    budgets = allocate(
        torch.tensor(weights).double()[:, None], torch.tensor([total]), torch.tensor([low]), torch.tensor([high])
    )[:, 0].tolist()
    assert sum(budgets) == total
    assert all(low <= budget <= high for budget in budgets)
    order = sorted(range(layers), key=lambda i: weights[i])
    assert all(budgets[a] <= budgets[b] + 1 for a, b in itertools.pairwise(order))


def test_asked_tokens_are_a_part_of_the_prompt():
    lengths = torch.tensor([35, 10, 2])
    assert asked_tokens(lengths, 0.2, None, 3).tolist() == [7, 3, 3]
    assert asked_tokens(lengths, None, 50, 3).tolist() == [50, 50, 50]


def test_d2o_keeps_the_asked_total_over_layers():
    model, tokens = build_model("rcmha", layers=5), prompt(2, 60)
    state = model.init_state(2, 60, cache=build_cache("d2o", {"keep_ratio": 0.3, "min_tokens": 0}))
    _, state = model.extend(tokens, state)
    state = model.compress(state)
    budgets = torch.stack([layer.mixing.budgets_B for layer in state.layers])
    assert budgets.sum(0).tolist() == [5 * 18, 5 * 18]
    assert len(set(budgets[:, 0].tolist())) > 1, "layers differ"
    for layer, budgets_B in zip(state.layers, budgets, strict=True):
        # One slot of the budget is the ring's, which takes the next token.
        assert torch.equal(layer.mixing.held_B, budgets_B)
        assert layer.mixing.slots == budgets_B.max()


def test_sinks_and_recent_tokens_are_protected_to_the_token():
    """Budgets of 20 and 36 with 4 sinks: a quarter of the other 16 and 32 tokens are the 4 and 8 newest."""
    policy = build_cache("d2o", {"max_tokens": 20, "sinks": 4})
    lengths, budgets = torch.tensor([90, 70]), torch.tensor([20, 36])
    positions = torch.arange(-1, 90)
    found = policy.protected(positions.expand(2, 1, -1).int(), budgets, lengths)
    for row, (length, newest) in enumerate([(90, 4), (70, 8)]):
        expected = (positions < 4) | (positions >= length - newest)
        assert torch.equal(found[row, 0], expected)


def test_lots_do_not_repeat_and_are_spread():
    lots = hashed(torch.arange(4000), seed=3)
    assert len(set(lots.tolist())) > 3990
    assert lots.mean().item() == pytest.approx(0.5, abs=0.02)
    assert not torch.equal(lots, hashed(torch.arange(4000), seed=4))


def test_threshold_belongs_to_one_sequence():
    """Two sequences of one process: the second starts from no threshold, so it gives what it gives first."""
    model, policy, tokens = build_model("gqa"), policy_of("d2o"), prompt(1, 24)
    expected, _ = run(model, policy, tokens, 14)
    run(model, policy, prompt(1, 24, seed=9), 14)
    again, _ = run(model, policy, tokens, 14)
    assert torch.equal(expected, again)


def test_official_keeps_a_set_a_head_and_decides_by_the_mean_of_heads():
    """Through the operations' references, which go head by head, and through the fast ones: the same entries and
    thresholds, which are equal over heads; the heads' positions are not."""
    model, policy = build_model("gqa"), build_cache("d2o", {"max_tokens": 12, "sinks": 2, "flavor": "official"})
    states = []
    for impl in ("reference", "torch"):
        for block in model.layers():
            block.attention.impl = impl
        states.append(run(model, policy, prompt(2, 30), 24)[1])
    for name, expected in states[0].tensors().items():
        torch.testing.assert_close(states[1].tensors()[name], expected, rtol=1e-9, atol=1e-9, msg=name)
    cache = states[1].layers[2].mixing
    places, thresholds = cache.kept.positions_BKP, cache.thresholds_BK
    assert not torch.equal(places[:, 0].sort().values, places[:, 1].sort().values)
    assert torch.equal(thresholds[:, 0], thresholds[:, 1])


def test_heads_that_decide_together_pair_what_they_evict_in_order():
    """Head 0 evicts slots 1 and 3, head 1 slots 0 and 2. Similarities .9 and .1, and .3 and .5: means .6 and .3 in that
    order, the threshold .45, so the first of each merges and the second does not."""

    def unit(cosine: float) -> list[float]:
        return [cosine, (1 - cosine**2) ** 0.5]

    kept, away = [1.0, 0.0], [1.0, 0.0]
    keys = torch.tensor([[kept, unit(0.9), away, unit(0.1)], [unit(0.3), kept, unit(0.5), away]]).double()[None]
    evict = torch.tensor([[[False, True, False, True], [True, False, True, False]]])
    for impl in ("reference", "torch"):
        merged = evict_merge(
            keys, keys, keep_BKS=~evict, evict_BKS=evict, slots=2, rule=MergeRule(kind="official", together=True),
            threshold_BK=torch.full((1, 2), math.nan).double(), merge_counts_BKS=torch.ones(1, 2, 4).double(),
            impl=impl,
        )  # fmt: skip
        assert merged.threshold_BK.tolist() == [[pytest.approx(0.45)] * 2]
        assert merged.merge_counts_BKM.sum(-1).tolist() == [[3.0, 3.0]]
        torch.testing.assert_close(merged.keys_BKMC[0, 0, 0], (keys[0, 0, 0] + 0.9 * keys[0, 0, 1]) / 2)
        torch.testing.assert_close(merged.keys_BKMC[0, 1, 0], (keys[0, 1, 1] + 0.3 * keys[0, 1, 0]) / 2)
    odd = evict.clone()
    odd[0, 0, 0] = True
    with pytest.raises(ValueError, match="evict as many entries each"):
        evict_merge(
            keys, keys, keep_BKS=~odd, evict_BKS=odd, slots=2, rule=MergeRule(together=True),
            threshold_BK=torch.zeros(1, 2).double(),
        )  # fmt: skip


def test_a_short_prompt_keeps_a_page():
    lengths = torch.tensor([1, 60, 64, 100, 400])
    for name in ("d2o", "streaming", "random_tokens"):
        assert build_cache(name, {"keep_ratio": 0.2})._asked(lengths).tolist() == [64, 64, 64, 64, 80]
        assert build_cache(name, {"keep_ratio": 0.2, "min_tokens": 0})._asked(lengths).tolist() == [6, 12, 13, 20, 80]
        assert build_cache(name, {"max_tokens": 9})._asked(lengths).tolist() == [9] * 5
    assert build_cache("snapkv", {"keep_ratio": 0.2}).budgets(lengths).tolist() == [64, 64, 64, 64, 80]
