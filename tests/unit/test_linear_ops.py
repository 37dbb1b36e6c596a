"""Linear attention: the chunked form and its backward against the recurrence, at every border and option."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from attnzoo.ops.common.masks import document_starts, padding_starts
from attnzoo.ops.linear_attention import linear_attention, weights
from attnzoo.ops.linear_attention import torch as linear_torch

B, N, K, H, V = 2, 6, 3, 5, 4
TIGHT = 1e-10
DECAYS = (0.5, 0.9, 0.999)


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Chunks of 8 and blocks of 2 chunks: every border is met at lengths where the recurrence is quick."""
    monkeypatch.setattr(weights, "CHUNK", 8)
    monkeypatch.setattr(weights, "BLOCK_BYTES", 0)
    monkeypatch.setattr(weights, "LEAST_CHUNKS", 2)


def inputs(tokens: int, *, decay: bool = True, memory: bool = True, normalise: bool = False, value: int = V) -> dict:
    """Every tensor with a gradient."""
    case = {
        "q": rand(B, N, tokens, H, seed=0),
        "k": rand(B, K, tokens, H, seed=1),
        "v": rand(B, K, tokens, value, seed=2),
        "decay_K": torch.tensor(DECAYS, dtype=torch.float64) if decay else None,
        "memory_BKHH": rand(B, K, H, value + int(normalise), seed=3) if memory else None,
    }
    if normalise:
        case |= {name: case[name].exp() for name in ("q", "k", "memory_BKHH") if case[name] is not None}
    return {name: None if tensor is None else tensor.requires_grad_() for name, tensor in case.items()}


def run(case: dict, impl: str, normalise: bool = False, **rest: object) -> dict[str, Tensor]:
    """Output, memory, and the gradients of a random functional of both for every input."""
    options = {name: case[name] for name in ("decay_K", "memory_BKHH")}
    out, memory = linear_attention(case["q"], case["k"], case["v"], normalise=normalise, impl=impl, **options, **rest)
    loss = (out * rand(*out.shape, seed=5, dtype=out.dtype)).sum()
    loss = loss + (memory * rand(*memory.shape, seed=6, dtype=memory.dtype)).sum()
    leaves = {name: tensor for name, tensor in case.items() if tensor is not None}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {"out": out, "memory": memory} | {f"gradient of {n}": g for n, g in zip(leaves, grads, strict=True)}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TIGHT) -> None:
    for name, right in expected.items():
        scale = max(1.0, right.abs().max().item())
        error = (actual[name] - right).abs().max().item() / scale
        assert error <= tolerance, f"{name} differs by {error:.3g}"


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 15, 16, 17, 41])
@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("memory", [False, True])
def test_reference(tokens, decay, normalise, memory):
    case = inputs(tokens, decay=decay, memory=memory, normalise=normalise)
    assert_same(run(case, "torch", normalise), run(case, "reference", normalise))


@pytest.mark.parametrize("counts", [[17, 3], [0, 16], [8, 9], [5, 0]])
@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
def test_reference_of_unequal_rows(counts, decay, normalise):
    """Padding holds NaN: it reaches neither outputs nor gradients."""
    case = inputs(17, decay=decay, normalise=normalise)
    with torch.no_grad():
        for row, count in enumerate(counts):
            for name in ("q", "k", "v"):
                case[name][row, :, count:] = float("nan")
    counts_B = torch.tensor(counts)
    actual = run(case, "torch", normalise, counts_B=counts_B)
    assert_same(actual, run(case, "reference", normalise, counts_B=counts_B))
    assert all(torch.isfinite(tensor).all() for tensor in actual.values())


@pytest.mark.parametrize("normalise", [False, True])
def test_one_token_of_unequal_rows(normalise):
    case = inputs(1, normalise=normalise)
    with torch.no_grad():
        case["q"][1], case["k"][1], case["v"][1] = (float("nan"),) * 3
    counts_B = torch.tensor([1, 0])
    actual = run(case, "torch", normalise, counts_B=counts_B)
    assert_same(actual, run(case, "reference", normalise, counts_B=counts_B))
    assert torch.equal(actual["memory"][1], case["memory_BKHH"][1])


STARTS = {
    "packed": lambda: document_starts(torch.tensor([0, 1, 4, 12, 16, 17, 50, 60, 72, 73, 82]), B, 41),
    "left padding": lambda: padding_starts(torch.tensor([41, 11]), 41, "left"),
    "right padding": lambda: padding_starts(torch.tensor([17, 0]), 41, "right"),
}


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
def test_reference_of_documents(name, decay, normalise):
    case, starts_BT = inputs(41, decay=decay, memory=False, normalise=normalise), STARTS[name]()
    assert_same(
        run(case, "torch", normalise, starts_BT=starts_BT), run(case, "reference", normalise, starts_BT=starts_BT)
    )


@pytest.mark.parametrize("decay", [False, True])
def test_packed_documents_equal_single_documents(decay):
    case, starts_BT = inputs(41, decay=decay, memory=False), STARTS["packed"]()
    q, k, v, decay_K = (case[name] for name in ("q", "k", "v", "decay_K"))
    out, memory = linear_attention(q, k, v, decay_K=decay_K, starts_BT=starts_BT)
    weight = rand(*out.shape, seed=5)
    packed = torch.autograd.grad((out * weight).sum(), [q, k, v])
    for row in range(B):
        edges = [*starts_BT[row].unique().tolist(), 41]
        for start, end in itertools.pairwise(edges):
            at = (slice(row, row + 1), slice(None), slice(start, end))
            single = [x[at].detach().requires_grad_() for x in (q, k, v)]
            alone, last = linear_attention(*single, decay_K=decay_K)
            torch.testing.assert_close(out[at], alone, rtol=0, atol=1e-12)
            grads = torch.autograd.grad((alone * weight[at]).sum(), single)
            for one, other in zip(packed, grads, strict=True):
                torch.testing.assert_close(one[at], other, rtol=0, atol=1e-12)
        torch.testing.assert_close(memory[row : row + 1], last, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cuts", [[41], [1] * 41, [8, 8, 25], [7, 1, 17, 16], [16, 25]])
@pytest.mark.parametrize("normalise", [False, True])
def test_any_partition(cuts, normalise):
    case = inputs(41, normalise=normalise)
    expected = run(case, "torch", normalise)
    memory, outputs = case["memory_BKHH"], []
    for q, k, v in zip(*(case[name].split(cuts, dim=2) for name in ("q", "k", "v")), strict=True):
        out, memory = linear_attention(q, k, v, decay_K=case["decay_K"], memory_BKHH=memory, normalise=normalise)
        outputs.append(out)
    out = torch.cat(outputs, dim=2)
    loss = (out * rand(*out.shape, seed=5)).sum() + (memory * rand(*memory.shape, seed=6)).sum()
    grads = torch.autograd.grad(loss, list(case.values()))
    names = [f"gradient of {name}" for name in case]
    assert_same({"out": out, "memory": memory} | dict(zip(names, grads, strict=True)), expected)


@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize("decay", [0.0, 1e-3, 1.0])
def test_extreme_decay(tokens, decay):
    """Powers are taken of whole distances, so that no decay is a logarithm of zero, in the gradient neither."""
    case = inputs(tokens)
    with torch.no_grad():
        case["decay_K"].fill_(decay)
    assert_same(run(case, "torch"), run(case, "reference"))


def test_decay_gradient_of_a_long_row_in_float32(monkeypatch):
    """A sum over distances, not a difference of sums over positions: nothing cancels."""
    monkeypatch.undo()
    q, k, v = (rand(1, 1, 3000, H, seed=seed, dtype=torch.float32) for seed in range(3))
    grads = []
    for dtype in (torch.float64, torch.float32):
        decay = torch.tensor([0.7], dtype=dtype, requires_grad=True)
        out, _ = linear_attention(q.to(dtype), k.to(dtype), v.to(dtype), decay_K=decay)
        grads += torch.autograd.grad((out * rand(*out.shape, seed=5, dtype=dtype)).sum(), decay)
    torch.testing.assert_close(grads[1].double(), grads[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("variant", ["plain", "decay", "normalise", "documents", "counts"])
def test_gradcheck(variant, monkeypatch):
    monkeypatch.setattr(weights, "CHUNK", 2)
    case = inputs(7, decay=variant != "plain", memory=variant != "documents", normalise=variant == "normalise", value=2)
    rest = {}
    if variant == "documents":
        rest["starts_BT"] = document_starts(torch.tensor([0, 3, 10, 14]), B, 7)
    if variant == "counts":
        rest["counts_B"] = torch.tensor([7, 4])
    names = [name for name, tensor in case.items() if tensor is not None]

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(names, tensors, strict=True))
        qkv = [given.pop(name) for name in ("q", "k", "v")]
        return linear_attention(*qkv, **given, **rest, normalise=variant == "normalise")

    assert torch.autograd.gradcheck(function, tuple(case[name] for name in names), fast_mode=True)


def test_heads_after_time():
    """q, k and v as they come from a projection: strided, and read without being made contiguous whole."""
    case = inputs(17)
    for name in ("q", "k", "v"):
        case[name] = case[name].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    assert_same(run(case, "torch"), run(case, "reference"))


@pytest.mark.parametrize("tokens", [1, 41])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(tokens, normalise, dtype):
    """Sums in float32: what is lost is the rounding of inputs and results."""
    case = inputs(tokens, normalise=normalise)
    for name in ("q", "k", "v"):
        case[name] = case[name].detach().to(dtype).requires_grad_()
    case["memory_BKHH"] = case["memory_BKHH"].detach().float().requires_grad_()
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in case.items()}
    actual, expected = run(case, "torch", normalise), run(exact, "reference", normalise)
    assert actual["out"].dtype == dtype
    assert actual["memory"].dtype == torch.float32
    for name in expected:
        error = (actual[name].double() - expected[name]).abs().max() / expected[name].abs().max()
        assert error < 4 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("tokens", [1, 17])
def test_autocast_leaves_the_sums_alone(tokens):
    case = {name: tensor.detach().float() for name, tensor in inputs(tokens).items()}
    q, k, v = (case.pop(name) for name in ("q", "k", "v"))
    expected = linear_attention(q, k, v, **case)
    with torch.autocast("cpu", torch.bfloat16):
        actual = linear_attention(q, k, v, **case)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


def test_nothing_is_written_into_the_inputs():
    case = inputs(1)
    before = case["memory_BKHH"].clone()
    with torch.no_grad():
        linear_attention(case["q"], case["k"], case["v"], decay_K=case["decay_K"], memory_BKHH=case["memory_BKHH"])
    assert torch.equal(case["memory_BKHH"], before)


def peak_bytes(tokens: int) -> int:
    """Most bytes alive at once during forward and backward, beyond the inputs."""
    q, k, v = (torch.randn(1, 4, tokens, 32, requires_grad=True) for _ in range(3))
    decay = torch.full((4,), 0.9, requires_grad=True)
    weight = torch.randn_like(q)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        out, _ = linear_attention(q, k, v, decay_K=decay)
        torch.autograd.grad(out, [q, k, v, decay], weight)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def test_memory_is_little_more_than_the_results(monkeypatch):
    """Each further token costs its output, its three gradients, and a small share of a memory."""
    monkeypatch.undo()
    short, long = peak_bytes(4096), peak_bytes(8192)
    results = 4 * 4096 * 4 * 32 * 4
    assert long - short <= 1.1 * results
    assert short <= results + 24 * weights.BLOCK_BYTES


def test_refusals():
    case = inputs(5)
    qkv, starts_BT = (case["q"], case["k"], case["v"]), torch.zeros(B, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="starts_BT belongs to the parallel form"):
        linear_attention(*qkv, memory_BKHH=case["memory_BKHH"], starts_BT=starts_BT)
    with pytest.raises(ValueError, match="starts_BT belongs to the parallel form"):
        linear_attention(*qkv, counts_B=torch.tensor([5, 4]), starts_BT=starts_BT)
    with pytest.raises(ValueError, match=r"starts_BT has shape \(2, 4\)"):
        linear_attention(*qkv, starts_BT=starts_BT[:, :4])
    with pytest.raises(ValueError, match=r"decay \(1,\) must be \(3,\), one a kv head"):
        linear_attention(*qkv, decay_K=torch.ones(1))
    with pytest.raises(ValueError, match="linear_attention has no implementation 'cuda'"):
        linear_attention(*qkv, impl="cuda")


def _broken_scan(patch: pytest.MonkeyPatch) -> None:
    right = linear_torch._scan
    patch.setattr(linear_torch, "_scan", lambda added, first, w, backwards=False: right(added, first * 0, w, backwards))


def _broken_documents(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weights.Work, "_documents", lambda self, start, end, first: (None, (None, None, None)))


def _broken_slopes(patch: pytest.MonkeyPatch) -> None:
    right = weights.Weights.add_slopes_
    patch.setattr(
        weights.Weights, "add_slopes_", lambda self, ddecay, inside, *rest: right(self, ddecay, inside * 0, *rest)
    )


@pytest.mark.parametrize("mutate", [_broken_scan, _broken_documents, _broken_slopes])
def test_mistakes_are_noticed(mutate, monkeypatch):
    case, starts_BT = inputs(41, memory=False), STARTS["packed"]()
    expected = run(case, "reference", starts_BT=starts_BT)
    assert_same(run(case, "torch", starts_BT=starts_BT), expected)
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        assert_same(run(case, "torch", starts_BT=starts_BT), expected)
