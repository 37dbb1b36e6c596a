"""Checks of the kernels of convolution and linear attention against float64 without kernels: on a CPU in Triton's
interpreter at tiny sizes, on a device at larger ones."""

import pytest
import torch
from torch import Tensor

from attnzoo.ops.common.masks import document_starts, padding_starts
from attnzoo.ops.depthwise_conv import depthwise_conv_qkv
from attnzoo.ops.linear_attention import linear_attention

HERE = not torch.cuda.is_available()
interpreted = pytest.mark.skipif(not HERE, reason="a GPU is here: tests/gpu runs the kernels on it")
Results = dict[str, Tensor]


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def leaf(x: Tensor | None, device: str, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(device, dtype).detach().requires_grad_()


def assert_same(actual: Results, expected: Results, tolerance: float) -> None:
    """Largest difference of each tensor, as a share of its largest value."""
    assert actual.keys() == expected.keys()
    for name, right in expected.items():
        scale = right.abs().max().clamp(min=1e-3).item() if right.numel() else 1.0
        error = (actual[name].double().cpu() - right.double().cpu()).abs().max().item() / scale
        assert error <= tolerance, f"{name} differs by {error:.3g}"


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 4e-3}
"""Rounding of inputs (none: they are exact in both), of factors inside the kernel, and of results."""


def starts_of(name: str | None, batch: int, tokens: int) -> Tensor | None:
    """Rows packed with documents of 1, 2, 3, ... tokens, or padded ones."""
    if name is None:
        return None
    if name == "packed":
        edges = torch.arange(0, 10_000).cumsum(0)
        total = batch * tokens
        return document_starts(torch.cat([edges[edges < total], torch.tensor([total])]), batch, tokens)
    lengths = torch.linspace(1, tokens, batch).long()
    return padding_starts(lengths, tokens, "left" if name == "left padding" else "right")


def conv_results(
    sizes: tuple[int, ...], device: str, dtype: torch.dtype, impl: str, starts: str | None = None, **form: bool
) -> Results:
    """Outputs and every gradient; `sizes` are B, T, N, K, H, W."""
    B, T, N, K, H, W = sizes
    counts = (N, K, K)
    rows = [1 if form.get("shared") else n for n in counts]
    rounded = torch.float64 if dtype == torch.float64 else dtype

    def make(*shape: int, seed: int) -> Tensor:
        return rand(*shape, seed=seed).to(form.get("inputs", rounded))

    named = {f"x{i}": make(B, n, T, H, seed=i).transpose(1, 2) for i, n in enumerate(counts)}
    named |= {f"kernel{i}": make(n, H, W, seed=10 + i) for i, n in enumerate(rows)}
    if form.get("bias", True):
        named |= {f"bias{i}": make(n, H, seed=20 + i) for i, n in enumerate(rows)}
    if form.get("tails"):
        named |= {f"tail{i}": make(B, W - 1, n, H, seed=30 + i) for i, n in enumerate(counts)}
    given = {name: leaf(x, device, dtype) for name, x in named.items()}
    triples = [tuple(given.get(f"{name}{i}") for i in range(3)) for name in ("x", "kernel", "bias", "tail")]
    starts_BT = starts_of(starts, B, T)
    out = depthwise_conv_qkv(
        triples[0],
        triples[1],
        biases=triples[2],
        tails=triples[3] if form.get("tails") else None,
        starts_BT=None if starts_BT is None else starts_BT.to(device),
        impl=impl,
    )
    weights = [rand(*y.shape, seed=40 + i).to(form.get("inputs", rounded)) for i, y in enumerate(out)]
    loss = sum((y * w.to(y.device, y.dtype)).sum() for y, w in zip(out, weights, strict=True))
    grads = torch.autograd.grad(loss, list(given.values()))
    return {f"y{i}": y.detach() for i, y in enumerate(out)} | {
        f"gradient of {name}": grad for name, grad in zip(given, grads, strict=True)
    }


CONV_CASES = {
    # B, T, N, K, H, W
    "one token": ((2, 1, 3, 1, 5, 3), {"tails": True}),
    "less than the width": ((1, 2, 2, 1, 5, 4), {}),
    "tails": ((2, 7, 3, 1, 5, 3), {"tails": True}),
    "tiles": ((2, 37, 2, 1, 5, 3), {}),
    "shared, no bias": ((2, 9, 3, 1, 5, 2), {"shared": True, "bias": False, "tails": True}),
    "packed": ((2, 37, 2, 1, 3, 4), {"starts": "packed"}),
    "left padding": ((2, 19, 2, 2, 5, 3), {"starts": "left padding"}),
    "right padding": ((2, 19, 2, 2, 5, 3), {"starts": "right padding"}),
}


def check_conv(sizes: tuple[int, ...], form: dict, device: str, dtype: torch.dtype) -> None:
    expected = conv_results(sizes, "cpu", torch.float64, "torch", inputs=dtype, **form)
    assert_same(conv_results(sizes, device, dtype, "triton", **form), expected, TOLERANCE[dtype])


def linear_results(
    sizes: tuple[int, ...], device: str, dtype: torch.dtype, impl: str, starts: str | None = None, **form: object
) -> Results:
    """Output, memory and every gradient; `sizes` are B, T, N, K, H, V."""
    B, T, N, K, H, V = sizes
    normalise, inputs = bool(form.get("normalise")), form.get("inputs", dtype)
    positive = torch.exp if normalise else torch.clone
    given = {
        "q": positive(rand(B, T, N, H, seed=0)).to(inputs).transpose(1, 2),
        "k": positive(rand(B, T, K, H, seed=1)).to(inputs).transpose(1, 2),
        "v": rand(B, T, K, V, seed=2).to(inputs).transpose(1, 2),
    }
    given = {name: leaf(x, device, dtype) for name, x in given.items()}
    wide = torch.promote_types(dtype, torch.float32)
    if form.get("decay", True):
        given["decay_K"] = leaf(torch.linspace(0.5, 0.99, K, dtype=torch.float64).float(), device, wide)
    if form.get("memory"):
        given["memory_BKHH"] = leaf(positive(rand(B, K, H, V + normalise, seed=3)).float(), device, wide)
    starts_BT, counts = starts_of(starts, B, T), form.get("counts")
    out, memory = linear_attention(
        given["q"],
        given["k"],
        given["v"],
        decay_K=given.get("decay_K"),
        memory_BKHH=given.get("memory_BKHH"),
        counts_B=None if counts is None else torch.tensor(counts, device=device),
        starts_BT=None if starts_BT is None else starts_BT.to(device),
        normalise=normalise,
        impl=impl,
    )
    weights = (rand(*out.shape, seed=5).to(inputs), rand(*memory.shape, seed=6).float())
    loss = (out * weights[0].to(device, out.dtype)).sum().double() + (memory * weights[1].to(device, wide)).sum()
    grads = torch.autograd.grad(loss, list(given.values()), allow_unused=True, materialize_grads=True)
    return {"out": out.detach(), "memory": memory.detach()} | {
        f"gradient of {name}": grad for name, grad in zip(given, grads, strict=True)
    }


LINEAR_CASES = {
    # B, T, N, K, H, V
    "one token": ((2, 1, 2, 1, 5, 3), {"memory": True, "normalise": True}),
    "less than a chunk": ((1, 5, 2, 2, 5, 3), {}),
    "whole chunks": ((1, 32, 1, 1, 5, 3), {"memory": True}),
    "one more than chunks": ((1, 33, 1, 1, 5, 3), {"memory": True, "normalise": True}),
    "no decay": ((1, 41, 2, 1, 5, 3), {"decay": False, "normalise": True}),
    "grouped": ((2, 41, 4, 2, 5, 3), {"memory": True}),
    "wide values": ((1, 20, 1, 1, 18, 35), {"memory": True, "normalise": True}),
    "unequal rows": ((3, 35, 2, 1, 5, 3), {"memory": True, "normalise": True, "counts": [35, 17, 0]}),
    "packed": ((2, 41, 2, 1, 5, 3), {"starts": "packed"}),
    "packed, normalised": ((1, 41, 2, 1, 5, 3), {"starts": "packed", "normalise": True}),
    "left padding": ((2, 41, 1, 1, 5, 3), {"starts": "left padding"}),
    "right padding": ((2, 41, 1, 1, 5, 3), {"starts": "right padding"}),
}


def check_linear(sizes: tuple[int, ...], form: dict, device: str, dtype: torch.dtype) -> None:
    expected = linear_results(sizes, "cpu", torch.float64, "torch", inputs=dtype, **form)
    assert_same(linear_results(sizes, device, dtype, "triton", **form), expected, TOLERANCE[dtype])


def check_decode(device: str, dtype: torch.dtype, normalise: bool) -> None:
    """Without gradients one token takes a kernel of its own; an idle row keeps its memory bit for bit."""
    B, N, K, H, V = 3, 4, 2, 5, 35
    q, k, v = (rand(B, n, 1, w, seed=i).exp().to(dtype) for i, (n, w) in enumerate([(N, H), (K, H), (K, V)]))
    memory, decay = rand(B, K, H, V + normalise, seed=3).exp().float(), torch.tensor([0.3, 0.9])
    k[2], v[2] = float("nan"), float("nan")
    counts = torch.tensor([1, 1, 0])
    results = []
    for impl, to in (("triton", lambda x: x.to(device)), ("torch", lambda x: x.double())):
        with torch.no_grad():
            out, after = linear_attention(
                to(q),
                to(k),
                to(v),
                decay_K=to(decay),
                memory_BKHH=to(memory),
                counts_B=counts.to(device) if impl == "triton" else counts,
                normalise=normalise,
                impl=impl,
            )
        results.append({"out": out, "memory": after})
    assert_same(*results, TOLERANCE[dtype])
    assert torch.equal(results[0]["memory"][2].cpu(), memory[2])


def check_repeatable(device: str, tokens: int) -> None:
    """No atomics: two runs agree bit for bit."""
    for results, sizes, form in (
        (conv_results, (2, tokens, 2, 1, 5, 3), {"starts": "packed"}),
        (linear_results, (2, tokens, 2, 1, 5, 3), {"starts": "packed", "normalise": True}),
    ):
        first, second = (results(sizes, device, torch.float32, "triton", **form) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
