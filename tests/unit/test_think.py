"""ThinK's options by hand: masks that are chosen anew, and value channels by what is read of them."""

import math

import pytest
import torch

from attnzoo.attention.parts.mixing import SoftmaxScoreFunction
from attnzoo.attention.parts.position import NoPosition
from attnzoo.kvcache import CacheSize, build_cache, compressed
from attnzoo.kvcache.base import CachedLayer, NewTokens
from attnzoo.kvcache.channels import change_channels, channel_scores, condensed
from attnzoo.kvcache.compressed import filled_tail
from attnzoo.kvcache.think import output_scores
from attnzoo.ops.common.masks import CAUSAL
from attnzoo.ops.common.step_inputs import StepInputs
from tests.contract.caches import build_model, prompt

READER = SoftmaxScoreFunction(NoPosition(), CAUSAL, "auto")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": "recomputed"}, "needs a second pruning: set repack_every, or prefill='stream'"),
        ({"mask": "recomputed", "repack_every": 4, "score": "greedy"}, "score='greedy' needs their products"),
        (
            {"mask": "recomputed", "repack_every": 4, "value_score": "output", "value_channel_ratio": 0.5},
            "value_score='output' needs their attention",
        ),
        ({"value_score": "output"}, "set it below 1"),
        ({"mask": "renewed"}, "cache.think.mask='renewed' is not one of 'kept', 'recomputed'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_cache("think", options)


def tokens_of(rows):
    """[1, heads, tokens, 2] from heads of rows."""
    return torch.tensor(rows, dtype=torch.float64)[None]


def fed(policy, state, queries, keys, values, first):
    step = StepInputs.planned([first], queries.shape[2])
    return policy.attend(state, READER, NewTokens(queries, keys, values, step))


@pytest.mark.parametrize("mask", ["kept", "recomputed"])
def test_a_recomputed_mask_by_hand(mask):
    """Two query heads, one kv head, two channels of which one stays, window 1, one more token until the tail is pruned.

    Prompt: keys (3, 1), (1, 2), the last token's queries (2, 1) and (0, 1), squares (4, 2). Sums of squares of the keys
    10 and 5: scores 40 and 10, channel 0 stays and the first key is (3, -).
    Token 2: key (0, 3), queries (1, 2) and (0, 1), squares (1, 5). Token 3 finds a tail of two and prunes key 1: scores
    are 1 (9 + 1 + 0) = 10 and 5 (0 + 4 + 9) = 65, since the first key has lost its 1. The mask moves to channel 1,
    where the first key is zero from now on and the second is 2; a mask that is kept would store 3 and 1.
    Token 3: key (4, 1), queries (2, 1) and (0, 2), squares (4, 5). Token 4 prunes key 2: 4 (0 + 0 + 0 + 16) = 64
    against 5 (0 + 4 + 9 + 1) = 70, so the mask stays; the tail alone would say 64 against 50.
    """
    policy = build_cache("think", {"channel_ratio": 0.5, "window": 1, "repack_every": 1, "mask": mask})
    keys = tokens_of([[[3, 1], [1, 2], [0, 3], [4, 1], [1, 5]]])
    values = tokens_of([[[1, 0], [0, 1], [2, 2], [3, 1], [0, 4]]])
    queries = tokens_of([[[7, 9], [2, 1], [1, 2], [2, 1], [1, 3]], [[8, 5], [0, 1], [0, 1], [0, 2], [2, 0]]])
    state = policy.init(CacheSize(1, 2, 1, 2, torch.float64), 2)
    _, state = fed(policy, state, queries[:, :, :2], keys[:, :, :2], values[:, :, :2], 0)
    (state,) = policy.compress([CachedLayer(state, READER, torch.tensor([2]))], final=True)
    assert state.channels_BKC.tolist() == [[[0]]]
    assert state.keys_BKPC.tolist() == [[[[3.0]]]]
    stored, channel = ([0.0, 2.0, 3.0], 1) if mask == "recomputed" else ([3.0, 1.0, 0.0], 0)
    for t in (2, 3, 4):
        one = slice(t, t + 1)
        out, state = fed(policy, state, queries[:, :, one], keys[:, :, one], values[:, :, one], t)
        if t > 2:
            assert state.channels_BKC.tolist() == [[[channel]]]
            assert state.keys_BKPC[0, 0, :, 0].tolist() == stored[: t - 1]
    for n in range(2):
        q = queries[0, n, 4]
        logits = [*(q[channel] * x for x in stored), q @ keys[0, 0, 3], q @ keys[0, 0, 4]]
        weights = torch.stack([x / math.sqrt(2) for x in logits]).softmax(0)
        assert torch.allclose(out[0, n, 0], weights @ values[0, 0])
    assert (state.queries_BNWH.shape[1] > 0) == (mask == "recomputed")


def test_condensed_queries_score_as_all_queries():
    queries, keys = torch.randn(2, 6, 5, 4).double(), torch.randn(2, 3, 7, 4).double()
    held = torch.rand(2, 1, 7) > 0.3
    expected = channel_scores(queries, keys, held)
    assert torch.allclose(channel_scores(condensed(queries, 3), keys, held), expected)


def test_changed_channels_by_hand():
    """Channels 0, 2, 3 to 1, 2, 3: what was not stored is zero."""
    stored = torch.tensor([[[[10.0, 12, 13], [20, 22, 23]]]])
    before, after = torch.tensor([[[0, 2, 3]]]), torch.tensor([[[1, 2, 3]]])
    assert change_channels(stored, before, after, 4).tolist() == [[[[0.0, 12, 13], [0, 22, 23]]]]


def test_value_channels_by_what_is_read_by_hand():
    """Queries (1, 0) in both heads, keys sqrt(2) ln w on channel 0: weights 1, 98 and 1 per cent. Values (5, 0), (0, 1)
    and zero: sums of squares are 25 and 1, but what is read is 0.05 and 0.98, in two heads 0.005 and 1.9208."""
    logs = [math.sqrt(2) * math.log(w) for w in (1, 98, 1)]
    keys = tokens_of([[[x, 0] for x in logs]])
    values, queries = tokens_of([[[5, 0], [0, 1], [0, 0]]]), tokens_of([[[1, 0]] * 3] * 2)
    for score, channel in (("norm", 0), ("output", 1)):
        options = {"channel_ratio": 1.0, "value_channel_ratio": 0.5, "window": 1, "value_score": score}
        policy = build_cache("think", options)
        state = policy.init(CacheSize(1, 2, 1, 2, torch.float64), 3)
        _, state = fed(policy, state, queries, keys, values, 0)
        layer = CachedLayer(state, READER, torch.tensor([3]))
        if score == "output":
            assert output_scores(layer, filled_tail(layer.state, layer.lengths_B))[0, 0].tolist() == pytest.approx(
                [0.005, 1.9208]
            )
        (state,) = policy.compress([layer], final=True)
        assert state.value_channels_BKV.tolist() == [[[channel]]]


@pytest.mark.parametrize("variant", ["gqa", "rcmha", "sinusoid"])
def test_value_score_is_what_the_channel_adds_to_the_outputs(variant):
    """Zeroing a value channel changes the last queries' outputs by its score; a prompt shorter than the window counts
    its own queries alone."""
    model, tokens, lengths = build_model(variant, layers=1), prompt(2, 11), torch.tensor([11, 3])
    options = {"value_channel_ratio": 0.5, "window": 5, "value_score": "output"}
    state = model.init_state(2, 11, cache=build_cache("think", options))
    _, state = model.extend(tokens, state, lengths)
    mixing = model.layers()[0].attention.mixing
    layer = CachedLayer(state.layers[0].mixing, mixing.score_function("auto"), lengths)
    tail = filled_tail(layer.state, layer.lengths_B)
    scores, queries = output_scores(layer, tail), layer.state.queries_BNWH
    for row, length in enumerate(lengths.tolist()):
        rows = min(5, length)
        keys, values = tail.keys_BKSH[row : row + 1, :, :length], tail.values_BKSH[row : row + 1, :, :length]
        places = torch.arange(length)[None]
        view = type(tail)(keys, values, places[:, None])
        last = queries[row : row + 1, :, -rows:]
        whole = layer.score_function.attend(last, view, places[:, -rows:])
        for d in range(6):
            for k in range(2):
                cut = values.clone()
                cut[:, k, :, d] = 0.0
                less = layer.score_function.attend(last, type(tail)(keys, cut, places[:, None]), places[:, -rows:])
                assert scores[row, k, d].item() == pytest.approx((whole - less).square().sum().item())


def test_a_mask_is_chosen_anew_after_every_chunk_of_a_prompt():
    """Two chunks with prefill="stream": the second one's mask is that of all keys as they are stored."""
    model, tokens = build_model("gqa", layers=1), prompt(2, 24)
    options = {"channel_ratio": 0.5, "window": 3, "prefill": "stream"}
    found = {}
    for mask in ("kept", "recomputed"):
        state = model.init_state(2, 24, cache=build_cache("think", options | {"mask": mask}))
        for part in tokens[:, :20].split(5, dim=1):
            _, state = model.extend(part, state)
        state = model.compress(state)
        found[mask] = state.layers[0].mixing
        assert torch.isfinite(model.extend(tokens[:, 20:], state)[0]).all()
    assert found["kept"].nbytes() == found["recomputed"].nbytes()
    assert not torch.equal(found["kept"].channels_BKC, found["recomputed"].channels_BKC)
    assert (found["recomputed"].keys_BKPC == 0).any()
    assert not (found["kept"].keys_BKPC == 0).any()


@pytest.mark.parametrize("options", [{}, {"repack_every": 3}, {"repack_every": 3, "mask": "recomputed"}], ids=str)
@pytest.mark.parametrize("length", [1, 4, 5, 6, 9])
def test_bytes_of_prompts_around_the_window(options, length, monkeypatch):
    """Window 5, pages of 4: what is allocated is what the policy says, through many prunings of the tail."""
    monkeypatch.setattr(compressed, "PAGE", 4)
    model, tokens = build_model("gqa", layers=1), prompt(2, length + 22)
    policy = build_cache("think", {"window": 5, "value_channel_ratio": 0.5, **options})
    (layer,) = model.layers()[0].attention.kv_layers()
    size = layer.size(2, torch.float64)
    state = model.init_state(2, length, cache=policy)
    _, state = model.extend(tokens[:, :length], state)
    state = model.compress(state)
    for after in range(22):
        claimed = policy.compressed_nbytes(size, length, tokens=after)
        assert state.layers[0].mixing.nbytes() == claimed, f"after {after} tokens"
        _, state = model.extend(tokens[:, length + after : length + after + 1], state)
