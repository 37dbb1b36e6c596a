"""The convolution of q, k and v: torch against the definition, documents, tails, gradients, memory."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from attnzoo.ops.common.masks import document_starts, padding_starts
from attnzoo.ops.depthwise_conv import depthwise_conv_qkv
from attnzoo.ops.depthwise_conv import torch as conv_torch

B, N, K, H = 3, 6, 2, 5
TIGHT = 1e-10


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()


def inputs(tokens: int, width: int = 3, shared: bool = False, tails: bool = False, bias: bool = True) -> dict:
    """Everything that has a gradient; the last kv head count differs from the first."""
    heads = (N, K, K)
    rows = [1 if shared else n for n in heads]
    return {
        "qkv": tuple(rand(B, tokens, n, H, seed=i) for i, n in enumerate(heads)),
        "kernels": tuple(rand(n, H, width, seed=10 + i) for i, n in enumerate(rows)),
        "biases": tuple(rand(n, H, seed=20 + i) if bias else None for i, n in enumerate(rows)),
        "tails": tuple(rand(B, width - 1, n, H, seed=30 + i) for i, n in enumerate(heads)) if tails else None,
    }


def leaves(case: dict) -> list[Tensor]:
    groups = [group for group in case.values() if group is not None]
    return [tensor for group in groups for tensor in group if tensor is not None]


def run(case: dict, impl: str, **rest: object) -> tuple[Tensor, ...]:
    """Outputs, then the gradients of a random functional of them for every leaf."""
    rest = {key: value for key, value in case.items() if key not in ("qkv", "kernels")} | rest
    out = depthwise_conv_qkv(case["qkv"], case["kernels"], impl=impl, **rest)
    weights = [rand(*y.shape, seed=40 + i, dtype=y.dtype).detach() for i, y in enumerate(out)]
    loss = sum((y * w).sum() for y, w in zip(out, weights, strict=True))
    return (*out, *torch.autograd.grad(loss, leaves(case)))


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=TIGHT, atol=TIGHT)


@pytest.fixture(params=["one tile", "tiles of 3 rows", "tiles of 2 sequences"])
def tile(request, monkeypatch):
    """Tile borders inside a sequence, and tiles of several sequences."""
    sizes = {"one tile": 1 << 20, "tiles of 3 rows": 3 * N * H * 8, "tiles of 2 sequences": 2 * 13 * N * H * 8}
    monkeypatch.setattr(conv_torch, "TILE_BYTES", sizes[request.param])


@pytest.mark.parametrize("tokens", [1, 2, 3, 13])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("tails", [False, True])
def test_reference(tokens, width, tails, tile):
    case = inputs(tokens, width, tails=tails)
    assert_same(run(case, "torch"), run(case, "reference"))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_reference_of_shared_kernels_and_no_bias(shared, bias, tile):
    case = inputs(13, shared=shared, bias=bias, tails=True)
    assert_same(run(case, "torch"), run(case, "reference"))


def packed_starts() -> Tensor:
    """Documents of 1, 2, 3 and more tokens, and one that crosses the end of its row."""
    return document_starts(torch.tensor([0, 1, 3, 6, 10, 20, 21, 22, 30, 39]), B, 13)


STARTS = {
    "packed": packed_starts,
    "left padding": lambda: padding_starts(torch.tensor([13, 1, 6]), 13, "left"),
    "right padding": lambda: padding_starts(torch.tensor([13, 0, 6]), 13, "right"),
}


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("width", [2, 3, 4])
def test_reference_of_documents(name, width, tile):
    case = inputs(13, width)
    assert_same(run(case, "torch", starts_BT=STARTS[name]()), run(case, "reference", starts_BT=STARTS[name]()))


def test_packed_documents_equal_single_documents(tile):
    case, starts = inputs(13), packed_starts()
    out = run(case, "torch", starts_BT=starts)
    kernel_gradients = [torch.zeros_like(kernel) for kernel in case["kernels"]]
    for row in range(B):
        edges = [*starts[row].unique().tolist(), 13]
        for start, end in itertools.pairwise(edges):
            single = {
                **case,
                "qkv": tuple(x[row : row + 1, start:end].detach().requires_grad_() for x in case["qkv"]),
            }
            y = depthwise_conv_qkv(single["qkv"], single["kernels"], biases=single["biases"])
            weights = [rand(*x.shape, seed=40 + i).detach()[row : row + 1, start:end] for i, x in enumerate(out[:3])]
            loss = sum((a * w).sum() for a, w in zip(y, weights, strict=True))
            grads = torch.autograd.grad(loss, [*single["qkv"], *single["kernels"]])
            for i in range(3):
                torch.testing.assert_close(out[i][row : row + 1, start:end], y[i], rtol=0, atol=1e-12)
                torch.testing.assert_close(out[3 + i][row : row + 1, start:end], grads[i], rtol=0, atol=1e-12)
                kernel_gradients[i] += grads[3 + i]
    assert_same(out[6:9], tuple(kernel_gradients))


def test_another_document_is_never_read():
    """Not even as 0 * NaN."""
    case, starts = inputs(13), packed_starts()
    q, k, v = (x.detach().clone() for x in case["qkv"])
    before = depthwise_conv_qkv((q, k, v), case["kernels"], starts_BT=starts)
    other = starts[0] != 6
    for x in (q, k, v):
        x[0, other] = float("nan")
    after = depthwise_conv_qkv((q, k, v), case["kernels"], starts_BT=starts)
    for one, two in zip(before, after, strict=True):
        assert torch.equal(one[0, ~other], two[0, ~other])
        assert torch.equal(one[1:], two[1:])


@pytest.mark.parametrize("cuts", [[13], [1] * 13, [2, 1, 7, 3]])
def test_any_partition_with_carried_rows(cuts):
    case = inputs(13)
    expected = depthwise_conv_qkv(case["qkv"], case["kernels"], biases=case["biases"])
    tails = tuple(torch.zeros_like(x[:, :2]) for x in case["qkv"])
    pieces = []
    for chunk in zip(*(x.split(cuts, dim=1) for x in case["qkv"]), strict=True):
        pieces.append(depthwise_conv_qkv(chunk, case["kernels"], biases=case["biases"], tails=tails))
        tails = tuple(torch.cat([tail, x], 1)[:, -2:] for tail, x in zip(tails, chunk, strict=True))
    for got, right in zip((torch.cat(y, 1) for y in zip(*pieces, strict=True)), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", ["tails", "starts", "shared"])
def test_gradcheck(variant, monkeypatch):
    monkeypatch.setattr(conv_torch, "TILE_BYTES", 2 * 3 * 2 * 8)
    starts = torch.tensor([[0, 0, 2, 2, 2], [0, 1, 1, 3, 4]]) if variant == "starts" else None
    rows = 1 if variant == "shared" else 3
    tail = rand(2, 2, 3, 2, seed=3) if variant == "tails" else None
    arguments = (rand(2, 5, 3, 2, seed=0), rand(rows, 2, 3, seed=1), rand(rows, 2, seed=2), tail, starts)
    assert torch.autograd.gradcheck(conv_torch.depthwise_conv_torch, arguments)


def test_views_of_one_projection():
    """q, k and v as slices of one tensor, heads before time: no stride is taken for granted."""
    case = inputs(13)
    joined = torch.cat([x.detach().transpose(1, 2) for x in case["qkv"]], dim=1)
    case["qkv"] = tuple(x.transpose(1, 2).requires_grad_() for x in joined.split([N, K, K], dim=1))
    assert_same(run(case, "torch"), run(case, "reference"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    case = {
        key: tuple(x.detach().to(dtype).requires_grad_() for x in group)
        for key, group in inputs(13, tails=True).items()
    }
    exact = {key: tuple(x.detach().double().requires_grad_() for x in group) for key, group in case.items()}
    for actual, expected in zip(run(case, "torch"), run(exact, "reference"), strict=True):
        assert actual.dtype == dtype
        error = (actual.double() - expected).abs().max() / expected.abs().max()
        assert error < 2 * torch.finfo(dtype).eps


def test_half_activations_with_full_kernels():
    """What autocast makes of it: the wider type wins, and gradients keep the type of their tensor."""
    case = inputs(13)
    case["qkv"] = tuple(x.detach().bfloat16().requires_grad_() for x in case["qkv"])
    case["kernels"] = tuple(x.detach().float().requires_grad_() for x in case["kernels"])
    case["biases"] = tuple(x.detach().float().requires_grad_() for x in case["biases"])
    out = run(case, "torch")
    assert [y.dtype for y in out[:3]] == [torch.float32] * 3
    assert [g.dtype for g in out[3:9]] == [torch.bfloat16] * 3 + [torch.float32] * 3


def peak_bytes(tokens: int) -> int:
    """Most bytes alive at once during forward and backward, beyond the inputs."""
    qkv = tuple(torch.randn(1, tokens, 8, 64, requires_grad=True) for _ in range(3))
    kernels = tuple(torch.randn(8, 64, 3, requires_grad=True) for _ in range(3))
    weights = [torch.randn_like(x) for x in qkv]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        out = depthwise_conv_qkv(qkv, kernels)
        torch.autograd.grad(out, [*qkv, *kernels], weights)
    results = profiler.profiler.kineto_results
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def test_memory_is_that_of_the_results():
    """Outputs and gradients, and tiles of constant size: no padded copy, no product as long as the row."""
    short, long = peak_bytes(2048), peak_bytes(4096)
    results = 6 * 2048 * 8 * 64 * 4
    assert long - short <= 1.01 * results
    assert short <= results + 8 * conv_torch.TILE_BYTES


def test_refusals():
    case = inputs(5)
    qkv, kernels = case["qkv"], case["kernels"]
    tails = tuple(torch.zeros(B, 2, n, H, dtype=torch.float64) for n in (N, K, K))
    starts = torch.zeros(B, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="give one of them"):
        depthwise_conv_qkv(qkv, kernels, tails=tails, starts_BT=starts)
    with pytest.raises(ValueError, match=r"starts_BT has shape \(3, 4\); it must be \(3, 5\)"):
        depthwise_conv_qkv(qkv, kernels, starts_BT=starts[:, :4])
    with pytest.raises(ValueError, match=r"kernel .* does not fit k .*: it must be \[2 or 1, 5, width\]"):
        depthwise_conv_qkv(qkv, (kernels[0], kernels[0], kernels[2]))
    with pytest.raises(ValueError, match="tail holds 3 rows; a kernel of width 3 needs 2"):
        depthwise_conv_qkv(qkv, kernels, tails=(tails[0], tails[1], torch.zeros(B, 3, K, H)))
    with pytest.raises(ValueError, match="of v must be"):
        depthwise_conv_qkv(qkv, kernels, biases=(None, None, torch.zeros(K, H + 1)))
    with pytest.raises(ValueError, match=r"must be \[B,T,N,H\], \[B,S,K,H\] and \[B,S,K,H\]"):
        depthwise_conv_qkv((qkv[0], qkv[1], qkv[2][:, :4]), kernels)
    with pytest.raises(ValueError, match="share one width"):
        depthwise_conv_qkv(qkv, (kernels[0], kernels[1], kernels[2][..., :2]))
    with pytest.raises(ValueError, match="depthwise_conv has no implementation 'cuda'"):
        depthwise_conv_qkv(qkv, kernels, impl="cuda")


@pytest.mark.parametrize("given", ["nothing", "tails", "documents"])
def test_the_form_for_the_compiler_is_the_same(given):
    """What torch.compile is given in place of tiles, without compiling it: outputs and gradients."""

    x, kernel, bias = (rand(*s, seed=i).requires_grad_() for i, s in enumerate([(2, 9, 3, 4), (3, 4, 3), (3, 4)]))
    tail = rand(2, 2, 3, 4, seed=3).requires_grad_() if given == "tails" else None
    age = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3, 4]] * 2) if given == "documents" else None
    inputs = [x, kernel, bias] if tail is None else [x, kernel, bias, tail]
    expected = conv_torch._DepthwiseConv.apply(x, kernel, bias, tail, age)
    actual = conv_torch._for_the_compiler(x, kernel, bias, tail, age)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    weights = rand(*actual.shape, seed=4)
    right = torch.autograd.grad((expected * weights).sum(), inputs)
    for got, want in zip(torch.autograd.grad((actual * weights).sum(), inputs), right, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
