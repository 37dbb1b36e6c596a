"""A bias given as a function of positions and head: in blocks, by distance, hiding, learned, with every cache."""

import importlib
import math

import pytest
import torch
from torch import nn

from attnzoo.attention import build_attention
from attnzoo.attention.edits import EditRun, Edits, Map, PutScores, TokenLayout, Where, layer_plan, layer_sizes
from attnzoo.attention.parts import Heads, ScoreBias, SoftmaxMixing
from attnzoo.kvcache import compressed
from attnzoo.ops import pairwise_sdpa as op
from attnzoo.ops.accumulated_attention import accumulated_attention
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.common.step_inputs import StepInputs
from attnzoo.ops.pairwise_sdpa import PairBias, pairwise_sdpa
from tests.contract.caches import check_registered
from tests.helpers.masked_ops import B, H, K, N, hiding_bias, rand
from tests.helpers.newcomers import newcomer

HEADS = Heads.of(12, 3, None, 4)
blocks = importlib.import_module("attnzoo.ops.pairwise_sdpa.torch")


@pytest.fixture(scope="module", autouse=True)
def biased():
    with newcomer("biased"):
        yield


@pytest.mark.parametrize("mask", [Mask(), Mask.full(), Mask(window=3, sinks=1), Mask(prefix_B=torch.tensor([6, 2]))])
def test_blocks_are_the_whole(mask, monkeypatch):
    """Outputs and gradients, of a learned bias too, do not depend on where blocks end."""
    qkv = [rand(B, heads, 11, H, seed=seed).requires_grad_() for seed, heads in ((0, N), (1, K), (2, K))]
    weight = rand(N, seed=3).requires_grad_()

    def run() -> tuple:
        bias = PairBias(lambda i, j, head: hiding_bias(i, j, head, weight[head] ** 2), N)
        out = pairwise_sdpa(*qkv, bias=bias, mask=mask)
        return out, torch.autograd.grad((out * rand(B, N, 11, H, seed=4)).sum(), [*qkv, weight])

    whole, grads = run()
    monkeypatch.setattr(blocks, "BLOCK", 4)
    part, part_grads = run()
    torch.testing.assert_close(part, whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(part_grads, grads, rtol=0, atol=1e-10)
    assert all(grad.isfinite().all() for grad in part_grads)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_a_query_from_which_the_bias_hides_everything_gets_zeros(impl):
    bias = PairBias(lambda i, j, head: torch.where(i == 2, -math.inf, 0.5 * (j - i).double()), 2)
    qkv = [rand(1, 2, 5, 4, seed=seed).requires_grad_() for seed in range(3)]
    out = pairwise_sdpa(*qkv, bias=bias, impl=impl)
    assert (out[:, :, 2] == 0.0).all()
    assert out[:, :, [0, 1, 3, 4]].abs().sum(-1).all()
    grads = torch.autograd.grad(out.sum(), qkv)
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][:, :, 2] == 0.0).all()


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_accumulated_attention_of_a_bias_of_pairs_by_hand(impl):
    """Queries at unequal places, one of them padding; in one head a query is shown nothing."""
    bias = PairBias(lambda i, j, head: torch.where((head == 1) & (i == 5), -math.inf, (j - 2.0 * i) / (head + 1)), 2)
    q, k = rand(2, 2, 2, 4), rand(2, 1, 6, 4, seed=1)
    queries_BT, keys_BKS = torch.tensor([[4, 5], [-1, 3]]), torch.arange(6).expand(2, 1, 6).clone()
    keys_BKS[1, 0, 1] = -1
    mask = Mask(query_positions_BT=queries_BT, key_positions_BKS=keys_BKS)
    expected = torch.zeros(2, 1, 6, dtype=torch.float64)
    for b in range(2):
        for n in range(2):
            for t in range(2):
                i = int(queries_BT[b, t])
                seen = [s for s in range(6) if 0 <= int(keys_BKS[b, 0, s]) <= i]
                if seen and not (n == 1 and i == 5):
                    scores = k[b, 0, seen] @ q[b, n, t] / 2 + (torch.tensor(seen) - 2.0 * i) / (n + 1)
                    expected[b, 0, seen] += scores.softmax(-1)
    found = accumulated_attention(q, k, mask=mask, tables=bias, impl=impl)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="accumulated_attention has no implementation 'triton'"):
        accumulated_attention(q, k, mask=mask, tables=bias, impl="triton")


@pytest.mark.parametrize(
    "options", [{}, {"bias": "buckets", "num_kv_heads": 1}, {"bias": "alibi", "by_distance": True}], ids=str
)
def test_every_cache_policy_takes_it(options, monkeypatch):
    monkeypatch.setattr(compressed, "PAGE", 4)
    check_registered("biased", options)


@pytest.mark.parametrize("bias", ["alibi", "buckets"])
def test_by_distance_is_the_same_function(bias):
    sizes = {"model_dim": 12, "num_heads": 3, "bias": bias}
    pairs, distances = (build_attention("biased", sizes | {"by_distance": by}).double() for by in (False, True))
    if bias == "buckets":
        nn.init.normal_(pairs.mixing.position.function.table)
    distances.load_state_dict(pairs.state_dict())
    x = rand(2, 9, 12)
    torch.testing.assert_close(distances(x), pairs(x), rtol=0, atol=1e-7)
    assert "triton" in distances.implementations
    assert not pairs.traits.shift_invariant
    with pytest.raises(ValueError, match="has no implementation 'triton'"):
        pairs.impl = "triton"


def test_memory_by_distance_grows_with_tokens_and_not_with_pairs():
    """Less than half of what the scores of all pairs would take, in both ways."""
    tokens = 1024
    for by_distance in (False, True):
        layer = build_attention("biased", {"model_dim": 8, "num_heads": 2, "bias": "alibi", "by_distance": by_distance})
        assert layer.training_memory(1, tokens).peak < 0.5 * 4 * 2 * tokens**2


class OfPosition(nn.Module):
    def forward(self, i, j, head):
        return j / 10.0 + 0 * i * head


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda i, j, head: (j + head) / 8, "the bias of query 0 and key 0 is not that of query 1 and key 1"),
        (lambda i, j, head: torch.where(i - j > 40, -math.inf, 0.0 * head), "not finite at a distance of 64"),
        (OfPosition(), "leave by_distance out"),
    ],
)
def test_by_distance_is_verified(function, message):
    with pytest.raises(ValueError, match=message):
        ScoreBias(HEADS, function, by_distance=True)
    ScoreBias(HEADS, function)


def test_a_bias_that_hides_later_is_found_when_it_does():
    class Hides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reach = nn.Parameter(torch.tensor(1e9), requires_grad=False)

        def forward(self, i, j, head):
            return torch.where(i - j > self.reach, -math.inf, 0.0 * head)

    position = ScoreBias(HEADS, Hides(), by_distance=True)
    position.function.reach.fill_(2)
    with pytest.raises(ValueError, match=r"not finite at a distance of 3; hide keys by the window"):
        position.attend([rand(1, 3, 5, 4)] * 3, Mask(), "auto")


def shaped(i, j, head):
    return torch.zeros(3, 7)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda i, j, head: i == j, "the score bias <lambda> returned truth values; return a tensor of numbers, -inf"),
        (lambda i, j, head: 1.0, "the score bias <lambda> returned float"),
        (lambda i, j, head: (j - i) * 1j, "the score bias <lambda> returned complex numbers; return a tensor of"),
        (shaped, r"the score bias shaped returned shape \[3, 7\]; .* broadcasts to \[1, 3, 4, 4\]"),
        (lambda i, j, head: (j - i).float().log(), "query 1, key 0 and head 0 is nan; it must be a number, or -inf"),
        (lambda i, j, head: -(i - j - 2 * head).float().log(), "query 0, key 0 and head 0 is inf"),
        (lambda i, j: 0.0 * i, "the function must take i, j and head .too many positional arguments"),
    ],
)
def test_a_function_that_no_softmax_can_take(function, message):
    """It is refused when the layer is built. Kills: NaN that is blamed on the learning rate."""
    with pytest.raises(ValueError, match=message):
        ScoreBias(HEADS, function)


def test_keys_after_the_query_are_asked_for_where_the_bias_is_meant_for_them():
    def later(i, j, head):
        return torch.where(j > i, torch.nan, 0.0 * head)

    ScoreBias(HEADS, later)
    with pytest.raises(ValueError, match="query 0, key 1 and head 0 is nan"):
        ScoreBias(HEADS, later, ahead=True)


@pytest.mark.parametrize("by_distance", [False, True])
def test_keys_after_the_query_need_a_bias_that_is_meant_for_them(by_distance):
    def bias(i, j, head):
        return -(i - j).abs() / 2 ** (head + 1)

    behind, both = (
        SoftmaxMixing(HEADS, ScoreBias(HEADS, bias, by_distance=by_distance, ahead=a)) for a in (False, True)
    )
    assert "full" in both.traits.masks
    assert not {"full", "prefix"} & behind.traits.masks
    qkv = [rand(1, 5, 3, 4, seed=seed) for seed in range(3)]
    out, mirrored = both(qkv, Mask.full(), "auto"), both([x.flip(1) for x in qkv], Mask.full(), "auto")
    torch.testing.assert_close(out.flip(2), mirrored, rtol=0, atol=1e-7)


def test_a_plain_function_with_parameters_is_refused():
    slope, module = nn.Parameter(torch.ones(3)), nn.Linear(1, 1)
    for function in (lambda i, j, head: slope[head] * (j - i), lambda i, j, head: module((j - i)[..., None].float())):
        with pytest.raises(ValueError, match=r"uses '(slope|module)', whose parameters .*make it an nn.Module"):
            ScoreBias(HEADS, function)


def test_an_edit_cannot_show_a_key_that_the_bias_hides():
    """Nor change a query that the bias leaves nothing; in the parallel form and streamed."""
    layer, x = build_attention("biased", {"model_dim": 12, "num_heads": 3}).double(), rand(1, 6, 12)
    function = layer.mixing.position.function
    layer.mixing.position.function = lambda i, j, head: torch.where(
        (i == 2) & (head == 1), -math.inf, function(i, j, head)
    )
    edits = Edits(PutScores(Where(), torch.zeros(1, 6, 6).tolist()), Map(dtype="fp64"))
    i, j, head = torch.arange(6)[:, None], torch.arange(6), torch.arange(3)[:, None, None]
    shown = (j <= i) & (layer.mixing.position.function(i, j, head) > -math.inf)
    expected = shown / shown.sum(-1, keepdim=True).clamp(min=1).double()
    for cuts in ([6], [2, 1, 3]):
        run, state = EditRun(edits.plan([layer_sizes(layer)], TokenLayout(6), 0)), layer.init_state(1, 6)
        for chunk in x.split(cuts, dim=1):
            _, state = layer.extend(chunk, state, edits=layer_plan([run], 0))
        torch.testing.assert_close(torch.as_tensor(run.reading[0].map), expected, rtol=0, atol=1e-9)
    run = EditRun(edits.plan([layer_sizes(layer)], TokenLayout(6), 0))
    assert layer(x, edits=layer_plan([run], 0)).isfinite().all()
    torch.testing.assert_close(torch.as_tensor(run.reading[0].map), expected, rtol=0, atol=1e-9)


def test_positions_that_a_causal_mask_hides_are_not_asked_for():
    """A logarithm of the distance is defined for every pair that the function is given, also where a slot is empty."""
    asked = []

    def function(i, j, head):
        asked.append((i - j).min().item())
        return -(i - j + 1.0).log() * (head + 1)

    mixing = SoftmaxMixing(HEADS, ScoreBias(HEADS, function))
    qkv = [rand(2, 5, 3, 4, seed=seed) for seed in range(3)]
    state = mixing.init_state(2, 9, device=None, dtype=torch.float64)
    out, state = mixing.extend(qkv, state, StepInputs.planned([0, 0], 5, [5, 2]), "auto")
    mixing.extend([x[:, :1] for x in qkv], state, StepInputs.planned([5, 2], 1), "auto")
    assert min(asked) >= 0
    assert out[0].isfinite().all()
    assert op.IMPLEMENTATIONS.keys() == {"reference", "torch"}
