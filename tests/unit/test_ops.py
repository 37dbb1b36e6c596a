"""Operations beyond what the contract exercises: arbitrary positions, refused shapes, explicit implementations."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from attnzoo.attention.parts import DistanceBias, Heads
from attnzoo.ops.biased_sdpa import biased_sdpa
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.linear_attention import linear_attention
from attnzoo.ops.relative_sdpa import relative_sdpa
from attnzoo.ops.rope import rope
from attnzoo.ops.sdpa import sdpa
from tests.helpers.masked_ops import (
    MASKS,
    NOWHERE,
    QUERIES,
    SOFTMAX_OPS,
    B,
    H,
    K,
    N,
    P,
    S,
    T,
    check_implementations,
    rand,
    sparse_positions,
)


@pytest.mark.parametrize("name", SOFTMAX_OPS)
def test_evicted_cache_of_each_kv_head(name):
    """Logical positions that survive eviction: any order, holes, and another set of keys for each kv head."""
    qkv = (rand(B, N, T, H), rand(B, K, S, H, seed=1), rand(B, K, S, H, seed=2))
    queries, keys = sparse_positions()
    run = SOFTMAX_OPS[name]
    mask = Mask(query_positions_BT=queries, key_positions_BKS=keys)
    expected, actual = run(qkv, mask=mask, impl="reference"), run(qkv, mask=mask, impl="torch")
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", SOFTMAX_OPS)
def test_hidden_keys_are_never_read(name):
    """What an empty entry holds changes nothing."""
    q, k, v = rand(B, N, T, H), rand(B, K, S, H, seed=1), rand(B, K, S, H, seed=2)
    queries, keys = sparse_positions()
    run = SOFTMAX_OPS[name]
    mask = Mask(query_positions_BT=queries, key_positions_BKS=keys)
    before = run((q, k, v), mask=mask)
    hidden = ((keys < 0) | (keys > queries.amax(1)[:, None, None]))[..., None]
    k, v = k.masked_fill(hidden, 1e3), v.masked_fill(hidden, 1e3)
    after = run((q, k, v), mask=mask)
    assert torch.equal(before, after)


@pytest.mark.parametrize("peaked", [False, True], ids=["flat", "peaked"])
@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("name", SOFTMAX_OPS)
def test_every_mask_backwards_and_forwards(name, case, peaked):
    check_implementations(name, case, peaked)


@pytest.mark.parametrize("name", ["sdpa", "biased_sdpa"])
def test_a_decode_step_of_one_sequence_that_sees_nothing_gives_zeros(name):
    mask = Mask(query_positions_BT=QUERIES[1:, :1], key_positions_BKS=NOWHERE[1:])
    with torch.no_grad():
        out = SOFTMAX_OPS[name]((rand(1, N, 1, H), rand(1, K, S, H), rand(1, K, S, H)), mask=mask)
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("mask", [Mask.full(), Mask(prefix_B=torch.tensor([2, 3]))], ids=["full", "prefix"])
def test_tables_without_rows_for_keys_after_the_query_are_refused(mask):
    qkv = (rand(B, N, T, H), rand(B, K, T, H), rand(B, K, T, H))
    table = {"content_bias_NH": rand(N, H), "table_NPH": rand(N, P, H), "table_bias_NP": rand(N, P)}
    for call in (
        lambda **rest: biased_sdpa(*qkv, bias_NP=rand(N, P), **rest),
        lambda **rest: relative_sdpa(*qkv, **table, **rest),
    ):
        with pytest.raises(
            ValueError, match=r"shows keys after the query.*future_rows=0 no distance i-j < 0 has a row"
        ):
            call(mask=mask)
        with pytest.raises(ValueError, match="future_rows=4 must lie between 0 and 3: there are 4 rows in all"):
            call(future_rows=P)


def test_memory_of_padded_keys_is_not_that_of_all_pairs():
    """torch's fused attention gets one number a key, not a matrix."""
    q, keys = torch.randn(1, 2, 700, 8), torch.rand(1, 700) < 0.5
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        sdpa(q, q, q, mask=Mask.full(keys))
    events = [e.nbytes() for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert max(events) < 700 * 700


@pytest.mark.parametrize("name", SOFTMAX_OPS)
def test_unknown_implementation_is_refused(name):
    qkv = (rand(B, N, T, H), rand(B, K, T, H), rand(B, K, T, H))
    with pytest.raises(ValueError, match=f"{name} has no implementation 'cuda'.*known: auto, reference, torch"):
        SOFTMAX_OPS[name](qkv, impl="cuda")


@pytest.mark.parametrize("name", SOFTMAX_OPS)
@pytest.mark.parametrize(
    "shapes",
    [
        ((B, 4, T, H), (B, K, T, H), (B, K, T, H)),
        ((B, N, T, H), (B, K, T, H), (B, K, T + 1, H)),
        ((B, N, T, H), (B, K, T, H + 1), (B, K, T, H)),
        ((B + 1, N, T, H), (B, K, T, H), (B, K, T, H)),
    ],
    ids=["heads", "length", "width", "batch"],
)
def test_shapes_that_do_not_fit_are_refused(name, shapes):
    with pytest.raises(ValueError, match="do not fit"):
        SOFTMAX_OPS[name](tuple(rand(*shape) for shape in shapes))


def test_table_of_wrong_size_is_refused():
    qkv = (rand(B, N, T, H), rand(B, K, T, H), rand(B, K, T, H))
    with pytest.raises(ValueError, match=r"they must be \[6, 7\], \[6, P, 7\] and \[6, P\]"):
        relative_sdpa(*qkv, content_bias_NH=rand(N, H), table_NPH=rand(N, P, H + 1), table_bias_NP=rand(N, P))


@pytest.mark.parametrize("shape", [(N + 1, P), (N, P, 1), (N,), (N, 0)], ids=str)
def test_bias_of_wrong_size_is_refused(shape):
    qkv = (rand(B, N, T, H), rand(B, K, T, H), rand(B, K, T, H))
    with pytest.raises(ValueError, match=r"bias has shape .*; it must be \[heads, distances\] = \[6, P\]"):
        biased_sdpa(*qkv, bias_NP=rand(*shape))


def test_a_bias_of_thousands_keeps_its_digits_in_half_precision():
    """-.5 * 2000 has no neighbour nearer than 4 in bfloat16, and e^4 is much: the bias stays in float32."""
    q = torch.zeros(1, 1, 4, 8, dtype=torch.bfloat16)
    v = torch.eye(4)[None, None].bfloat16()
    bias_NP = -2000.0 - 0.5 * torch.arange(4.0)[None]
    expected = torch.softmax(torch.tensor([-1.5, -1.0, -0.5, 0.0]), 0)
    places = Mask(query_positions_BT=torch.arange(4)[None], key_positions_BKS=torch.arange(4)[None, None])
    for mask in (Mask(), places):
        out = biased_sdpa(q, q, v, bias_NP=bias_NP, mask=mask)
        torch.testing.assert_close(out[0, 0, -1].float(), expected, rtol=0.01, atol=0)


class Slope(DistanceBias):
    """Keys before the query lose half of their distance, keys after it all."""

    def bias(self, distance_P):
        return torch.where(distance_P < 0, distance_P, -0.5 * distance_P).expand(self.heads.num_heads, -1)


def test_a_bias_by_distance_is_asked_for_keys_after_the_query_by_masks_that_show_them():
    position = Slope(Heads.of(2 * H, 2, 1, None))
    q = torch.zeros(1, 2, 3, H, dtype=torch.float64)
    v = torch.eye(4, H, dtype=torch.float64)[None, None]
    distance = torch.arange(3)[:, None] - torch.arange(4)
    scores = torch.where(distance < 0, distance, -0.5 * distance)
    for impl in ("torch", "reference"):
        out = position.attend((q, torch.zeros_like(v), v), Mask.full(), impl)
        torch.testing.assert_close(out[0, 1, :, :4], scores.double().softmax(-1), rtol=0, atol=1e-6)
        out = position.attend((q, torch.zeros_like(v[:, :, :3]), v[:, :, :3]), Mask(), impl)
        expected = scores[:, :3].double().masked_fill(distance[:, :3] < 0, float("-inf")).softmax(-1)
        torch.testing.assert_close(out[0, 1, :, :3], expected, rtol=0, atol=1e-6)


def test_rope_refuses_odd_width():
    with pytest.raises(ValueError, match="head_dim=7 must be even"):
        rope(rand(B, T, N, 7), positions_BT=torch.arange(T)[None])
    with pytest.raises(ValueError, match="head_dim=8, 6 must be even and the same"):
        rope(rand(B, T, N, 8), rand(B, T, N, 6), positions_BT=torch.arange(T)[None])


def test_rope_depends_on_the_difference_only():
    q, k = rand(1, 1, 1, 8), rand(1, 1, 1, 8, seed=1)
    products = [
        (rope(q, positions_BT=torch.tensor([[i]]))[0] * rope(k, positions_BT=torch.tensor([[j]]))[0]).sum()
        for i, j in ((5, 2), (103, 100), (3, 0))
    ]
    torch.testing.assert_close(torch.stack(products), products[0].expand(3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 150])
@pytest.mark.parametrize("decayed", [True, False])
def test_linear_attention_across_chunk_borders(tokens, decayed):
    """Around the chunk length, with grouped heads, a memory to continue from and unequal rows."""
    q, k, v = rand(B, N, tokens, H).exp(), rand(B, K, tokens, H, seed=1).exp(), rand(B, K, tokens, H, seed=2)
    decay = torch.tensor([0.5, 0.9, 0.999], dtype=torch.float64) if decayed else None
    options = {"decay_K": decay, "memory_BKHH": rand(B, K, H, H + 1, seed=3).exp(), "normalise": True}
    counts = torch.tensor([tokens, tokens // 2])
    expected = linear_attention(q, k, v, counts_B=counts, impl="reference", **options)
    actual = linear_attention(q, k, v, counts_B=counts, impl="torch", **options)
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(actual[0][0], expected[0][0], rtol=1e-11, atol=1e-12)
    real = tokens // 2
    torch.testing.assert_close(actual[0][1, :, :real], expected[0][1, :, :real], rtol=1e-11, atol=1e-12)


def test_strong_decay_neither_overflows_nor_vanishes():
    """decay^64 underflows in float32; differences of logarithms must not turn that into inf or NaN."""
    q, k, v = (rand(1, 1, 200, 4, seed=s).float() for s in range(3))
    out, memory = linear_attention(q, k, v, decay_K=torch.tensor([1e-3]))
    expected, _ = linear_attention(q, k, v, decay_K=torch.tensor([1e-3]), impl="reference")
    assert torch.isfinite(memory).all()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_linear_attention_refuses_wrong_memory():
    q, k, v = rand(B, N, T, H), rand(B, K, T, H), rand(B, K, T, H)
    with pytest.raises(ValueError, match=r"memory \(2, 3, 7, 7\) must be \(2, 3, 7, 8\) with normalise=True"):
        linear_attention(q, k, v, memory_BKHH=rand(B, K, H, H), normalise=True)
    with pytest.raises(ValueError, match="q has 5 tokens and k has 4"):
        linear_attention(q, k[:, :, :4], v[:, :, :4])
