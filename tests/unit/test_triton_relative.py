"""The Triton kernels of relative attention in Triton's interpreter, against dense float64."""

import dataclasses

import pytest
import torch

from attnzoo.ops.common.masks import CausalMask, document_starts, padding_starts
from tests.helpers.attention_oracle import NAMES, dense_attention, leaves, random_inputs

if torch.cuda.is_available():
    pytest.skip("a GPU is here: tests/gpu runs the kernels on it, not in the interpreter", allow_module_level=True)
pytest.importorskip("triton", reason="the package triton is not installed")

BLOCK = 16
SCALE = 0.37


def attend(inputs, mask, block=BLOCK, scale=SCALE):
    from attnzoo.ops.relative_sdpa.triton import relative_sdpa_triton

    return relative_sdpa_triton(*inputs, mask, scale, block)


def documents(batch: int, tokens: int, *edges: int) -> CausalMask:
    return CausalMask(starts_BT=document_starts(torch.tensor([0, *edges, batch * tokens]), batch, tokens))


def padded(side: str, tokens: int, *lengths: int, **rest: int) -> CausalMask:
    return CausalMask(starts_BT=padding_starts(torch.tensor(lengths), tokens, side), **rest)


CASES = {
    # (batch, heads, kv heads, tokens, head_dim, rows of the table), mask
    "one token": ((2, 2, 1, 1, 5, 3), CausalMask()),
    "one row": ((1, 2, 2, 37, 8, 1), CausalMask()),
    "two rows": ((1, 1, 1, 33, 8, 2), CausalMask()),
    "less than a block": ((1, 2, 1, 7, 20, 9), CausalMask()),
    "table ends inside a block": ((2, 4, 2, 37, 8, 9), CausalMask()),
    "table ends one before a block": ((1, 1, 1, 50, 8, 16), CausalMask()),
    "table ends with a block": ((1, 1, 1, 50, 8, 17), CausalMask()),
    "table ends one after a block": ((1, 1, 1, 50, 8, 18), CausalMask()),
    "table as long as the row": ((1, 3, 1, 53, 5, 53), CausalMask()),
    "table longer than the row": ((1, 2, 1, 47, 5, 100), CausalMask()),
    "whole blocks": ((1, 1, 1, 64, 16, 40), CausalMask()),
    "documents": ((2, 2, 1, 67, 5, 30), documents(2, 67, 3, 40, 75, 76, 110)),
    "documents and a window": (
        (2, 1, 1, 67, 5, 30),
        dataclasses.replace(documents(2, 67, 3, 40, 75, 76, 110), window=19),
    ),
    "documents, window and sinks": (
        (2, 1, 1, 67, 5, 30),
        dataclasses.replace(documents(2, 67, 3, 40, 75, 76, 110), window=9, sinks=2),
    ),
    "left padding": ((2, 1, 1, 51, 5, 30), padded("left", 51, 20, 51)),
    "right padding": ((3, 1, 1, 51, 5, 13), padded("right", 51, 20, 51, 0)),
    "left padding, window and sinks": ((2, 1, 1, 51, 5, 11), padded("left", 51, 29, 51, window=7, sinks=3)),
    "window of one": ((1, 1, 1, 35, 5, 30), CausalMask(window=1)),
    "window": ((1, 2, 1, 69, 5, 100), CausalMask(window=20)),
    "window of blocks": ((1, 1, 1, 69, 5, 11), CausalMask(window=32)),
    "window and sinks": ((1, 2, 1, 69, 5, 60), CausalMask(window=20, sinks=3)),
    "no table": ((2, 4, 2, 39, 5, None), CausalMask()),
    "no table, window and documents": (
        (2, 2, 1, 67, 5, None),
        dataclasses.replace(documents(2, 67, 3, 40, 75, 76, 110), window=19),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients(name):
    sizes, mask = CASES[name]
    inputs = random_inputs(*sizes)
    actual_leaves, expected_leaves = leaves(inputs), leaves(inputs, dtype=torch.float64)
    actual, expected = attend(actual_leaves, mask), dense_attention(expected_leaves, mask, SCALE)
    torch.testing.assert_close(actual, expected.float(), rtol=0, atol=1e-5)
    weight = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1))
    (actual * weight).sum().backward()
    (expected * weight).sum().backward()
    for label, one, other in zip(NAMES, actual_leaves, expected_leaves, strict=True):
        if one is not None:
            torch.testing.assert_close(
                one.grad, other.grad.float(), rtol=0, atol=1e-4, msg=lambda text, label=label: f"{label}: {text}"
            )


def test_low_precision():
    """Products in float16, sums in float32: errors stay near the rounding of the inputs.

    bfloat16 is for tests/gpu: Triton's interpreter multiplies its bit patterns.
    """
    inputs = [x.half() for x in random_inputs(1, 2, 1, 37, 8, 20)]
    one, other = leaves(inputs), leaves(inputs, dtype=torch.float64)
    actual, expected = attend(one, CausalMask()), dense_attention(other, CausalMask(), SCALE)
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
    attend(mixed, CausalMask()).float().sum().backward()
    assert [x.grad.dtype for x in mixed] == [torch.float16] * 3 + [torch.float32] * 3


@pytest.mark.heavy
def test_backward_is_repeatable():
    inputs = random_inputs(2, 2, 1, 37, 5, 20)
    runs = []
    for _ in range(2):
        one = leaves(inputs)
        attend(one, documents(2, 37, 30, 50)).square().sum().backward()
        runs.append([x.grad for x in one])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_only_what_needs_a_gradient_gets_one():
    inputs = random_inputs(1, 2, 1, 19, 5, 20)
    inputs[0].requires_grad_()
    attend(inputs, CausalMask()).sum().backward()
    assert inputs[0].grad is not None
    assert all(x.grad is None for x in inputs[1:])


def test_tensors_of_any_layout():
    """What is not token-major in memory is copied, and its gradient comes back in place."""
    inputs = random_inputs(1, 2, 1, 19, 5, 20)
    fused = torch.cat(inputs[:3], dim=1).transpose(1, 2).contiguous().requires_grad_()
    split = [x.transpose(1, 2) for x in fused.split([2, 1, 1], dim=2)]
    actual = attend([*split, *inputs[3:]], CausalMask())
    torch.testing.assert_close(actual, dense_attention(inputs, CausalMask(), SCALE).float(), rtol=0, atol=1e-5)
    actual.sum().backward()
    assert fused.grad.shape == fused.shape


def streaming(tokens: int, entries: int, kv_heads: int, batch: int = 2, **rest: int) -> CausalMask:
    """Queries at unequal places; each kv head holds other entries, in no order, with holes."""
    generator = torch.Generator().manual_seed(3)
    latest = 80
    queries_BT = torch.stack([torch.arange(tokens) + latest - tokens - 30 * b for b in range(batch)])
    keys_BKS = torch.stack(
        [torch.stack([torch.randperm(latest, generator=generator)[:entries] for _ in range(kv_heads)])] * batch
    )
    keys_BKS[torch.rand(keys_BKS.shape, generator=generator) < 0.2] = -1
    return CausalMask(query_positions_BT=queries_BT, key_positions_BKS=keys_BKS, **rest)


STREAMS = {
    # (batch, heads, kv heads, head_dim, rows), tokens, entries, mask
    "holes in any order": ((2, 4, 2, 5, 20), 5, 43, streaming(5, 43, 2)),
    "one token": ((2, 4, 2, 16, 100), 1, 50, streaming(1, 50, 2)),
    "more queries than a program takes": ((2, 2, 1, 5, 20), 19, 37, streaming(19, 37, 1)),
    "one entry": ((2, 2, 1, 5, 1), 3, 1, streaming(3, 1, 1)),
    "window": ((2, 2, 1, 5, 20), 5, 43, streaming(5, 43, 1, window=11)),
    "window and sinks": ((2, 2, 1, 5, 20), 5, 60, streaming(5, 60, 1, window=11, sinks=8)),
    "no table": ((2, 4, 2, 5, None), 5, 43, streaming(5, 43, 2)),
}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("shared", [False, True], ids=["each its positions", "shared positions"])
def test_streaming(name, shared):
    (batch, heads, kv_heads, head_dim, rows), tokens, entries, mask = STREAMS[name]
    if shared:
        mask = dataclasses.replace(
            mask, query_positions_BT=mask.query_positions_BT[:1], key_positions_BKS=mask.key_positions_BKS[:1, :1]
        )
    q, _, _, *parameters = random_inputs(batch, heads, kv_heads, tokens, head_dim, rows)
    _, k, v, *_ = random_inputs(batch, heads, kv_heads, entries, head_dim, rows, seed=1)
    expected = dense_attention([q, k, v, *parameters], mask, SCALE)
    hidden = (~mask.visible(tokens, q.device)).all(2)[..., None]  # seen by no query
    empty = (mask.key_positions_BKS < 0)[..., None] & hidden
    k, v = k.masked_fill(empty, float("nan")), v.masked_fill(empty, float("inf"))
    actual = attend([q, k, v, *parameters], mask)
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
    mask = CausalMask(query_positions_BT=torch.tensor([[3, 9]]), key_positions_BKS=torch.tensor([[[-1, 7, 5, -1]]]))
    q, _, _, *parameters = random_inputs(1, 2, 1, 2, 5, 20)
    _, k, v, *_ = random_inputs(1, 2, 1, 4, 5, 20)
    out = attend([q, k, v, *parameters], mask)
    assert torch.equal(out[:, :, 0], torch.zeros(1, 2, 5))
    assert (out[:, :, 1] != 0).all()
    empty = attend(
        [q, k[:, :, :0], v[:, :, :0], *parameters],
        dataclasses.replace(mask, key_positions_BKS=torch.zeros(1, 1, 0, dtype=torch.int64)),
    )
    assert torch.equal(empty, torch.zeros(1, 2, 2, 5))


def test_what_the_kernels_cannot_do_is_refused():
    q, k, v, *parameters = random_inputs(1, 2, 1, 3, 5, 20)
    with pytest.raises(ValueError, match=r"float64.*use impl='torch'"):
        attend([q.double(), k.double(), v.double(), *parameters], CausalMask())
    with pytest.raises(ValueError, match="interpreter takes bfloat16 for integers"):
        attend([x.bfloat16() for x in (q, k, v)] + parameters, CausalMask())
    with pytest.raises(ValueError, match="not keys of 5 and values of 4; use impl='torch'"):
        attend([q, k, v[..., :4], *parameters], CausalMask())
    with pytest.raises(ValueError, match="give both or neither"):
        attend([q, k, v, None, parameters[1], None], CausalMask())
    with pytest.raises(ValueError, match="no gradients with positions: use impl='torch'"):
        attend([q.requires_grad_(), k, v, *parameters], streaming(3, 3, 1, batch=1))
