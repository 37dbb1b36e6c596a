"""Operations beyond what the contract exercises: arbitrary positions, refused shapes, explicit implementations."""

import pytest
import torch

from attnzoo.ops.biased_sdpa import biased_sdpa
from attnzoo.ops.common.masks import CausalMask
from attnzoo.ops.linear_attention import linear_attention
from attnzoo.ops.relative_sdpa import relative_sdpa
from attnzoo.ops.rope import rope
from attnzoo.ops.sdpa import sdpa
from attnzoo.ops.sinusoid_sdpa import sinusoid_sdpa

B, N, K, T, S, H, P, D = 2, 6, 3, 5, 11, 7, 4, 10


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sparse_positions() -> tuple[torch.Tensor, torch.Tensor]:
    """Queries at unequal places; each kv head keeps other keys, in no order, with holes (-1)."""
    queries_BT = torch.tensor([[20, 21, 22, 23, 24], [7, 8, 9, 10, 11]])
    generator = torch.Generator().manual_seed(3)
    keys_BKS = torch.stack(
        [torch.stack([torch.randperm(26, generator=generator)[:S] for _ in range(K)]) for _ in range(B)]
    )
    keys_BKS[:, :, 2] = -1
    keys_BKS[:, :, 3] = 0  # every query sees at least one key
    return queries_BT, keys_BKS


SOFTMAX_OPS = {
    "sdpa": lambda qkv, **rest: sdpa(*qkv, **rest),
    "biased_sdpa": lambda qkv, **rest: biased_sdpa(*qkv, bias_NP=rand(N, P, seed=7), **rest),
    "relative_sdpa": lambda qkv, **rest: relative_sdpa(
        *qkv,
        content_bias_NH=rand(N, H, seed=4),
        table_NPH=rand(N, P, H, seed=5),
        table_bias_NP=rand(N, P, seed=6),
        **rest,
    ),
    "sinusoid_sdpa": lambda qkv, **rest: sinusoid_sdpa(
        *qkv,
        content_bias_NH=rand(N, H, seed=4),
        position_bias_NH=rand(N, H, seed=5),
        weight_NHD=rand(N, H, D, seed=6),
        **rest,
    ),
}


@pytest.mark.parametrize("name", SOFTMAX_OPS)
def test_evicted_cache_of_each_kv_head(name):
    """Logical positions that survive eviction: any order, holes, and another set of keys for each kv head."""
    qkv = (rand(B, N, T, H), rand(B, K, S, H, seed=1), rand(B, K, S, H, seed=2))
    queries, keys = sparse_positions()
    run = SOFTMAX_OPS[name]
    mask = CausalMask(query_positions_BT=queries, key_positions_BKS=keys)
    expected, actual = run(qkv, mask=mask, impl="reference"), run(qkv, mask=mask, impl="torch")
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", SOFTMAX_OPS)
def test_hidden_keys_are_never_read(name):
    """What an empty entry holds changes nothing."""
    q, k, v = rand(B, N, T, H), rand(B, K, S, H, seed=1), rand(B, K, S, H, seed=2)
    queries, keys = sparse_positions()
    run = SOFTMAX_OPS[name]
    mask = CausalMask(query_positions_BT=queries, key_positions_BKS=keys)
    before = run((q, k, v), mask=mask)
    hidden = ((keys < 0) | (keys > queries.amax(1)[:, None, None]))[..., None]
    k, v = k.masked_fill(hidden, 1e3), v.masked_fill(hidden, 1e3)
    after = run((q, k, v), mask=mask)
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", SOFTMAX_OPS)
def test_unknown_implementation_is_refused(name):
    qkv = (rand(B, N, T, H), rand(B, K, T, H), rand(B, K, T, H))
    with pytest.raises(ValueError, match=f"{name} has no implementation 'cuda'.*known: auto, reference, torch, triton"):
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
    places = CausalMask(query_positions_BT=torch.arange(4)[None], key_positions_BKS=torch.arange(4)[None, None])
    for mask in (CausalMask(), places):
        out = biased_sdpa(q, q, v, bias_NP=bias_NP, mask=mask)
        torch.testing.assert_close(out[0, 0, -1].float(), expected, rtol=0.01, atol=0)


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
