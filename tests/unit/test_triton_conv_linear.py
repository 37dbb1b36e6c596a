"""The kernels of convolution and linear attention in Triton's interpreter, against float64 without kernels.

tests/gpu/test_conv_linear_gpu.py runs the same checks at larger sizes on a device.
"""

import pytest
import torch

from attnzoo.ops.depthwise_conv import depthwise_conv_qkv
from attnzoo.ops.linear_attention import linear_attention
from tests.helpers.conv_linear_kernels import (
    CONV_CASES,
    LINEAR_CASES,
    assert_same,
    check_conv,
    check_decode,
    check_linear,
    check_repeatable,
    interpreted,
    leaf,
    rand,
)

triton = pytest.importorskip("triton", reason="the package triton is not installed")


@pytest.fixture
def small_tiles(monkeypatch):
    """Chunks of 16 and columns of 16: several of each at sizes that the interpreter can bear."""
    from attnzoo.ops.depthwise_conv import triton as conv
    from attnzoo.ops.linear_attention import triton as linear

    right = linear._sizes
    monkeypatch.setattr(linear, "_sizes", lambda *given: right(*given)._replace(chunk=16, value_block=16))
    monkeypatch.setattr(conv, "TILE", 128)


@interpreted
@pytest.mark.parametrize("name", CONV_CASES)
def test_convolution(name, small_tiles):
    check_conv(*CONV_CASES[name], "cpu", torch.float32)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_convolution_in_low_precision(dtype, small_tiles):
    check_conv((2, 19, 2, 1, 5, 3), {"tails": True}, "cpu", dtype)


@interpreted
@pytest.mark.parametrize("name", LINEAR_CASES)
def test_linear(name, small_tiles):
    check_linear(*LINEAR_CASES[name], "cpu", torch.float32)


@interpreted
def test_linear_at_its_own_sizes():
    check_linear((1, 70, 1, 1, 7, 5), {"memory": True, "normalise": True}, "cpu", torch.float32)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_in_low_precision(dtype, small_tiles):
    check_linear((1, 35, 2, 1, 5, 3), {"memory": True, "normalise": True}, "cpu", dtype)


@interpreted
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode(normalise, dtype):
    check_decode("cpu", dtype, normalise)


@pytest.mark.heavy
@interpreted
def test_repeatable(small_tiles):
    check_repeatable("cpu", 35)


@interpreted
def test_float16_memories_may_grow_large(small_tiles):
    """A sum of products leaves the range of float16 long before its quotient does."""
    q, k, v = (torch.full((1, 1, 40, 4), 60.0, dtype=torch.float16) for _ in range(3))
    out, memory = linear_attention(q, k, v, normalise=True, impl="triton")
    assert memory.max() == 40 * 3600
    torch.testing.assert_close(out, v)


@interpreted
def test_strong_decay(small_tiles):
    """Powers underflow to zero and never to NaN; a decay of 0 is every token alone."""
    q, k, v = (rand(1, 2, 40, 4, seed=s) for s in range(3))
    decay = torch.tensor([0.0, 1e-3], dtype=torch.float64)
    results = []
    for dtype, impl in ((torch.float32, "triton"), (torch.float64, "torch")):
        given = [leaf(x, "cpu", dtype) for x in (q, k, v, decay)]
        out, memory = linear_attention(*given[:3], decay_K=given[3], impl=impl)
        grads = torch.autograd.grad((out * q.to(dtype)).sum(), given)
        results.append(dict(enumerate([out.detach(), memory.detach(), *grads])))
    assert_same(*results, 1e-5)


@interpreted
def test_float64_is_refused():
    x = rand(1, 2, 1, 4, seed=0)
    with pytest.raises(ValueError, match="depthwise_conv with impl='triton' sums in float32"):
        depthwise_conv_qkv((x, x, x), (rand(1, 4, 3, seed=1),) * 3, impl="triton")
    with pytest.raises(ValueError, match="linear_attention with impl='triton' sums in float32"):
        linear_attention(x, x, x, impl="triton")


def test_without_the_interpreter_a_cpu_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(1, 2, 1, 4)
    with pytest.raises(ValueError, match="set TRITON_INTERPRET=1 before the start"):
        depthwise_conv_qkv((x, x, x), (torch.zeros(1, 4, 3),) * 3, impl="triton")
    with pytest.raises(ValueError, match="set TRITON_INTERPRET=1 before the start"):
        linear_attention(x, x, x, impl="triton")
