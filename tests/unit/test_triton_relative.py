"""The Triton kernels of relative attention in Triton's interpreter, against dense float64."""

import dataclasses

import pytest
import torch

from attnzoo.ops.common.masks import Mask, document_starts, padding_keys, padding_starts
from attnzoo.ops.common.tables import Tables
from tests.helpers.attention_oracle import NAMES, dense_attention, leaves, random_inputs

if torch.cuda.is_available():
    pytest.skip("a GPU is here: tests/gpu runs the kernels on it, not in the interpreter", allow_module_level=True)
pytest.importorskip("triton", reason="the package triton is not installed")

BLOCK = 16
SCALE = 0.37


def attend(inputs, mask, future_rows=0):
    from attnzoo.ops.relative_sdpa.triton import relative_sdpa_triton

    tables = None if inputs[4] is None else Tables(*inputs[3:], future_rows)
    return relative_sdpa_triton(*inputs[:3], tables, mask, SCALE, BLOCK)


def documents(batch: int, tokens: int, *edges: int) -> Mask:
    return Mask(starts_BT=document_starts(torch.tensor([0, *edges, batch * tokens]), batch, tokens))


def padded(side: str, tokens: int, *lengths: int, **rest: int) -> Mask:
    return Mask(starts_BT=padding_starts(torch.tensor(lengths), tokens, side), **rest)


PACKED = documents(2, 37, 3, 30, 41, 42, 60)
"""Two rows of 37 tokens: a document goes on in the second row, one has a single token."""
CASES = {
    # (batch, heads, kv heads, tokens, head_dim, rows of the table), mask; blocks hold 16 tokens
    "one token": ((2, 2, 1, 1, 5, 3), Mask()),
    "one row": ((1, 1, 1, 19, 8, 1), Mask()),
    "two rows": ((1, 1, 1, 33, 8, 2), Mask()),
    "less than a block": ((1, 2, 1, 7, 20, 9), Mask()),
    "table ends inside a block": ((2, 2, 1, 35, 8, 9), Mask()),
    "table ends one before a block": ((1, 1, 1, 35, 8, 16), Mask()),
    "table ends with a block": ((1, 1, 1, 35, 8, 17), Mask()),
    "table reaches one distance into a tile": ((1, 1, 1, 35, 8, 19), Mask()),
    "table as long as the row": ((1, 2, 1, 35, 5, 35), Mask()),
    "table longer than the row": ((1, 1, 1, 35, 5, 100), Mask()),
    "whole blocks": ((1, 1, 1, 32, 16, 20), Mask()),
    "documents": ((2, 1, 1, 37, 5, 20), PACKED),
    "documents, window and sinks": ((2, 1, 1, 37, 5, 20), dataclasses.replace(PACKED, window=9, sinks=2)),
    "left padding": ((2, 1, 1, 35, 5, 20), padded("left", 35, 14, 35)),
    "right padding": ((3, 1, 1, 35, 5, 13), padded("right", 35, 14, 35, 0)),
    "left padding, window and sinks": ((2, 1, 1, 35, 5, 11), padded("left", 35, 20, 35, window=7, sinks=3)),
    "window of one": ((1, 1, 1, 35, 5, 30), Mask(window=1)),
    "window": ((1, 1, 1, 53, 5, 100), Mask(window=20)),
    "window of blocks": ((1, 1, 1, 53, 5, 11), Mask(window=32)),
    "window and sinks": ((1, 1, 1, 53, 5, 60), Mask(window=20, sinks=3)),
    "no table": ((2, 4, 2, 19, 5, None), Mask()),
    "no table, window and documents": ((2, 1, 1, 37, 5, None), dataclasses.replace(PACKED, window=19)),
}


def some_keys(batch: int, entries: int) -> torch.Tensor:
    """Two of three keys exist, in no order; of the last row none."""
    keys_BS = torch.rand(batch, entries, generator=torch.Generator().manual_seed(5)) < 0.67
    keys_BS[-1] = False
    return keys_BS


AHEAD = {
    # (batch, heads, kv heads, tokens, head_dim, rows of the table), keys, rows for keys after the query, mask
    "full": ((1, 2, 1, 21, 5, 20), 21, 7, Mask.full()),
    "full, more keys": ((2, 1, 1, 19, 5, 40), 37, 16, Mask.full(padding_keys(torch.tensor([29, 8]), 37, "left"))),
    "full, fewer keys": ((2, 1, 1, 53, 5, 2), 19, 1, Mask.full(padding_keys(torch.tensor([18, 1]), 19, "right"))),
    "full, no table, some keys": ((2, 2, 1, 19, 5, None), 35, 0, Mask.full(some_keys(2, 35))),
    "prefix": ((2, 1, 1, 35, 5, 20), 35, 6, Mask(prefix_B=torch.tensor([21, 0]))),
    "prefix of all, no table": ((2, 1, 1, 35, 5, None), 35, 0, Mask(prefix_B=torch.tensor([17, 35]))),
    "prefix and a window": ((2, 1, 1, 37, 5, 30), 37, 9, Mask(prefix_B=torch.tensor([35, 5]), window=5)),
    "prefix, window, sinks, some keys": (
        (2, 1, 1, 37, 5, 30),
        37,
        17,
        Mask(prefix_B=torch.tensor([20, 5]), window=9, sinks=3, keys_BS=some_keys(2, 37)),
    ),
    "causal, padded keys": (
        (2, 1, 1, 35, 5, 20),
        35,
        0,
        Mask(keys_BS=padding_keys(torch.tensor([17, 8]), 35, "left")),
    ),
    "causal, rows for keys after the query": ((1, 1, 1, 19, 5, 30), 19, 9, Mask()),
}


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients(name):
    sizes, mask = CASES[name]
    check(random_inputs(*sizes), mask)


@pytest.mark.parametrize("name", AHEAD)
def test_keys_after_the_query_and_keys_that_do_not_exist(name):
    """A query that sees nothing gets exactly zeros, and so do all gradients where no query sees anything."""
    sizes, entries, future_rows, mask = AHEAD[name]
    inputs = random_inputs(*sizes, entries=entries)
    actual, q_grad = check(inputs, mask, future_rows)
    empty = ~mask.visible(sizes[3], entries, actual.device).any(-1).expand(sizes[0], sizes[1], -1)
    assert (actual[empty] == 0.0).all()
    assert (q_grad[empty] == 0.0).all()


def check(inputs, mask, future_rows=0):
    """Against dense float64, outputs and gradients; returns the output and the gradient of the queries."""
    actual_leaves, expected_leaves = leaves(inputs), leaves(inputs, dtype=torch.float64)
    actual = attend(actual_leaves, mask, future_rows)
    expected = dense_attention(expected_leaves, mask, SCALE, future_rows=future_rows)
    torch.testing.assert_close(actual, expected.float(), rtol=0, atol=1e-5)
    weight = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1))
    (actual * weight).sum().backward()
    (expected * weight).sum().backward()
    for label, one, other in zip(NAMES, actual_leaves, expected_leaves, strict=True):
        if one is not None:
            torch.testing.assert_close(
                one.grad, other.grad.float(), rtol=0, atol=1e-4, msg=lambda text, label=label: f"{label}: {text}"
            )
    return actual.detach(), actual_leaves[0].grad


def test_low_precision():
    """Products in float16, sums in float32: errors stay near the rounding of the inputs.

    bfloat16 is for tests/gpu: Triton's interpreter multiplies its bit patterns.
    """
    inputs = [x.half() for x in random_inputs(1, 2, 1, 19, 8, 20)]
    one, other = leaves(inputs), leaves(inputs, dtype=torch.float64)
    actual, expected = attend(one, Mask()), dense_attention(other, Mask(), SCALE)
    assert actual.dtype == torch.float16
    actual.float().square().sum().backward()
    expected.square().sum().backward()
    step = torch.finfo(torch.float16).eps
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=4 * step)
    for x, y in zip(one, other, strict=True):
        assert x.grad.dtype == torch.float16
        assert (x.grad.double() - y.grad).abs().max() <= 4 * step * y.grad.abs().max()


def test_parameters_may_be_wider_than_activations():
    """Under autocast the tables stay float32; so do their gradients."""
    *tokenwise, content_bias, table, table_bias = random_inputs(1, 2, 1, 19, 8, 20)
    mixed = leaves([*(x.half() for x in tokenwise), content_bias, table, table_bias])
    attend(mixed, Mask()).float().sum().backward()
    assert [x.grad.dtype for x in mixed] == [torch.float16] * 3 + [torch.float32] * 3


@pytest.mark.heavy
def test_backward_is_repeatable():
    inputs = random_inputs(2, 2, 1, 17, 5, 20)
    runs = []
    for _ in range(2):
        one = leaves(inputs)
        attend(one, documents(2, 17, 14, 23)).square().sum().backward()
        runs.append([x.grad for x in one])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_only_what_needs_a_gradient_gets_one():
    inputs = random_inputs(1, 2, 1, 19, 5, 20)
    inputs[0].requires_grad_()
    attend(inputs, Mask()).sum().backward()
    assert inputs[0].grad is not None
    assert all(x.grad is None for x in inputs[1:])


def test_tensors_of_any_layout():
    """What is not token-major in memory is copied, and its gradient comes back in place."""
    inputs = random_inputs(1, 2, 1, 19, 5, 20)
    fused = torch.cat(inputs[:3], dim=1).transpose(1, 2).contiguous().requires_grad_()
    split = [x.transpose(1, 2) for x in fused.split([2, 1, 1], dim=2)]
    actual = attend([*split, *inputs[3:]], Mask())
    torch.testing.assert_close(actual, dense_attention(inputs, Mask(), SCALE).float(), rtol=0, atol=1e-5)
    actual.sum().backward()
    assert fused.grad.shape == fused.shape


def streaming(tokens: int, entries: int, kv_heads: int, batch: int = 2, **rest: int) -> Mask:
    """Queries at unequal places; each kv head holds other entries, in no order, with holes."""
    generator = torch.Generator().manual_seed(3)
    latest = 80
    queries_BT = torch.stack([torch.arange(tokens) + latest - tokens - 30 * b for b in range(batch)])
    keys_BKS = torch.stack(
        [torch.stack([torch.randperm(latest, generator=generator)[:entries] for _ in range(kv_heads)])] * batch
    )
    keys_BKS[torch.rand(keys_BKS.shape, generator=generator) < 0.2] = -1
    return Mask(query_positions_BT=queries_BT, key_positions_BKS=keys_BKS, **rest)


STREAMS = {
    # (batch, heads, kv heads, head_dim, rows), tokens, entries, mask
    "holes in any order": ((2, 4, 2, 5, 20), 5, 43, streaming(5, 43, 2)),
    "one token": ((2, 4, 2, 16, 100), 1, 50, streaming(1, 50, 2)),
    "more queries than a program takes": ((2, 2, 1, 5, 20), 19, 37, streaming(19, 37, 1)),
    "one entry": ((2, 2, 1, 5, 1), 3, 1, streaming(3, 1, 1)),
    "window": ((2, 2, 1, 5, 20), 5, 43, streaming(5, 43, 1, window=11)),
    "window and sinks": ((2, 2, 1, 5, 20), 5, 60, streaming(5, 60, 1, window=11, sinks=8)),
    "no table": ((2, 4, 2, 5, None), 5, 43, streaming(5, 43, 2)),
    "full": ((2, 2, 1, 5, 20), 5, 43, streaming(5, 43, 1, causal=False)),
    "prefix": ((2, 4, 2, 5, 20), 5, 60, streaming(5, 60, 2, prefix_B=torch.tensor([78, 47]), window=11)),
}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("shared", [False, True], ids=["each its positions", "shared positions"])
def test_streaming(name, shared):
    (batch, heads, kv_heads, head_dim, rows), tokens, entries, mask = STREAMS[name]
    future_rows = 3 if mask.ahead else 0
    if shared:
        mask = dataclasses.replace(
            mask, query_positions_BT=mask.query_positions_BT[:1], key_positions_BKS=mask.key_positions_BKS[:1, :1]
        )
    q, _, _, *parameters = random_inputs(batch, heads, kv_heads, tokens, head_dim, rows)
    _, k, v, *_ = random_inputs(batch, heads, kv_heads, entries, head_dim, rows, seed=1)
    expected = dense_attention([q, k, v, *parameters], mask, SCALE, future_rows=future_rows)
    hidden = (~mask.visible(tokens, entries, q.device)).all(2)[..., None]  # seen by no query
    empty = (mask.key_positions_BKS < 0)[..., None] & hidden
    k, v = k.masked_fill(empty, float("nan")), v.masked_fill(empty, float("inf"))
    actual = attend([q, k, v, *parameters], mask, future_rows)
    torch.testing.assert_close(actual, expected.float(), rtol=0, atol=1e-5)


def test_streaming_reads_views_of_a_larger_cache():
    """Caches are views of buffers with room left; what lies beyond the view is not read."""
    mask = streaming(3, 20, 2)
    q, _, _, *parameters = random_inputs(2, 4, 2, 3, 5, 20)
    buffers = [torch.full((2, 2, 50, 5), float("nan")) for _ in range(2)]
    for buffer, seed in zip(buffers, (1, 2), strict=True):
        buffer[:, :, :20] = random_inputs(2, 2, 2, 20, 5, None, seed=seed)[1]
    k, v = (buffer[:, :, :20] for buffer in buffers)
    actual = attend([q, k, v, *parameters], mask)
    torch.testing.assert_close(actual, dense_attention([q, k, v, *parameters], mask, SCALE).float(), rtol=0, atol=1e-5)


def test_query_without_keys_gets_zeros():
    mask = Mask(query_positions_BT=torch.tensor([[3, 9]]), key_positions_BKS=torch.tensor([[[-1, 7, 5, -1]]]))
    q, _, _, *parameters = random_inputs(1, 2, 1, 2, 5, 20)
    _, k, v, *_ = random_inputs(1, 2, 1, 4, 5, 20)
    out = attend([q, k, v, *parameters], mask)
    assert torch.equal(out[:, :, 0], torch.zeros(1, 2, 5))
    assert (out[:, :, 1] != 0).all()
    nothing = [q.requires_grad_(), k[:, :, :0], v[:, :, :0], *parameters]
    nowhere = dataclasses.replace(mask, key_positions_BKS=torch.zeros(1, 1, 0, dtype=torch.int64))
    with torch.no_grad():
        assert torch.equal(attend(nothing, nowhere), torch.zeros(1, 2, 2, 5))
    empty = attend(nothing, Mask.full(), future_rows=5)
    assert torch.equal(empty, torch.zeros(1, 2, 2, 5))
    empty.sum().backward()
    assert torch.equal(q.grad, torch.zeros_like(q))


def test_what_the_kernels_cannot_do_is_refused():
    q, k, v, *parameters = random_inputs(1, 2, 1, 3, 5, 20)
    with pytest.raises(ValueError, match=r"float64.*use impl='torch'"):
        attend([q.double(), k.double(), v.double(), *parameters], Mask())
    with pytest.raises(ValueError, match="interpreter takes bfloat16 for integers"):
        attend([x.bfloat16() for x in (q, k, v)] + parameters, Mask())
    with pytest.raises(ValueError, match="not keys of 5 and values of 4; use impl='torch'"):
        attend([q, k, v[..., :4], *parameters], Mask())
    with pytest.raises(ValueError, match="no mask with pairs; use impl='torch'"):
        attend([q, k, v, *parameters], Mask(pairs=torch.ones(1, 3, 3, dtype=torch.bool)))
    with pytest.raises(ValueError, match="no gradients with positions: use impl='torch'"):
        attend([q.requires_grad_(), k, v, *parameters], streaming(3, 3, 1, batch=1))
