"""No product meets a denormal number, however peaked the scores or small the decay, forwards and backwards."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnzoo.ops.accumulated_attention import accumulated_attention
from attnzoo.ops.common import row_blocks
from attnzoo.ops.common.masks import Mask, document_starts
from attnzoo.ops.common.negligible import attention_of_peaked, smallest_weight, softmax_of_peaked_, without_negligible
from attnzoo.ops.linear_attention import linear_attention
from attnzoo.ops.paged_decode import paged_decode
from attnzoo.ops.paged_decode.entries import Entries
from attnzoo.ops.relative_sdpa import relative_sdpa
from attnzoo.ops.sdpa import sdpa
from attnzoo.ops.sinusoid_sdpa import sinusoid_sdpa

B, N, K, T, H = 2, 4, 2, 67, 8
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "baddbmm_", "_softmax_backward_data", "mv", "dot")
FUSED_BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"
OURS = {"row_blocks": row_blocks._forward, "row_blocks_backward": row_blocks._row_blocks_backward._init_fn}


class Denormals(TorchDispatchMode):
    """Names of the products that were given a denormal number, and of torch's fused backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func.name().split("::")
        name = name.split(".")[0]
        if namespace == "attnzoo":  # one operator to torch; what it is made of is what we are after
            with self:
                return OURS[name](*args, **(kwargs or {}))
        if name == FUSED_BACKWARD or (name in PRODUCTS and any(map(has_denormals, args))):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def has_denormals(x) -> bool:
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return False
    return bool(((x != 0) & (x.abs() < torch.finfo(x.dtype).tiny)).any())


def rand(*shape: int, seed: int, size: float = 1.0, dtype=torch.float32) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * size).requires_grad_()


def streamed(window: int | None = None) -> Mask:
    """The last 20 tokens as queries of all, some entries empty, one query that sees nothing."""
    queries, keys = torch.arange(T - 20, T).repeat(B, 1), torch.arange(T).repeat(B, 1, 1)
    queries[0, 0] = -1
    keys[:, :, 5:9] = -1
    return Mask(query_positions_BT=queries, key_positions_BKS=keys, window=window)


MASKS = {
    "causal": Mask(),
    "window": Mask(window=30, sinks=2),
    "documents": Mask(starts_BT=document_starts(torch.tensor([0, 40, T, 90, 2 * T]), B, T)),
    "streamed": streamed(),
}


def attention(name: str, mask: Mask, size: float, dtype=torch.float32, impl="torch"):
    """(inputs, output) of an operation whose scores have a standard deviation of about size^2 * sqrt(H)."""
    rows = T if mask.parallel else 20
    q, k = rand(B, N, rows, H, seed=0, size=size, dtype=dtype), rand(B, K, T, H, seed=1, size=size, dtype=dtype)
    v, u = rand(B, K, T, H, seed=2, dtype=dtype), rand(N, H, seed=3, dtype=dtype)
    if name == "sdpa":
        return [q, k, v], sdpa(q, k, v, mask=mask, impl=impl)
    if name == "relative":
        table, table_bias = rand(N, 40, H, seed=4, dtype=dtype), rand(N, 40, seed=5, size=size, dtype=dtype)
        terms = {"content_bias_NH": u, "table_NPH": table, "table_bias_NP": table_bias}
        return [q, k, v, *terms.values()], relative_sdpa(q, k, v, mask=mask, impl=impl, **terms)
    weight = rand(N, H, 12, seed=6, dtype=dtype)
    terms = {"content_bias_NH": u, "position_bias_NH": u, "weight_NHD": weight}
    return [q, k, v, u, weight], sinusoid_sdpa(q, k, v, mask=mask, impl=impl, **terms)


@pytest.mark.parametrize("size", [4.0, 6.0, 12.0, 100.0])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["sdpa", "relative", "sinusoid"])
def test_peaked_scores_forwards_and_backwards(name, mask, size, monkeypatch):
    monkeypatch.setattr(row_blocks, "BLOCK", 16)
    with Denormals() as mode:
        _, out = attention(name, MASKS[mask], size)
        out.square().sum().backward()
    assert mode.found == []


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["sdpa", "relative"])
def test_gradients_of_peaked_scores_are_those_of_the_reference(name, mask):
    # float64, scores far beyond the 354 within which no weight is negligible there.
    inputs, out = attention(name, MASKS[mask], 30.0, torch.float64)
    expected_inputs, expected = attention(name, MASKS[mask], 30.0, torch.float64, impl="reference")
    weight = rand(*out.shape, seed=9, dtype=torch.float64).detach()
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for x, y in zip(inputs, expected_inputs, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-9 * float(y.grad.abs().max()))


def test_calm_scores_keep_torchs_fused_form():
    with Denormals() as mode:
        attention("sdpa", Mask(), 1.0)[1].sum().backward()
    assert mode.found == [FUSED_BACKWARD]


def test_without_gradients_the_fused_form_serves_peaked_scores_too():
    q, k, v = (rand(B, N, T, H, seed=i, size=20.0, dtype=torch.float64).detach() for i in range(3))
    torch.testing.assert_close(sdpa(q, k, v, impl="torch"), sdpa(q, k, v, impl="reference"))


@pytest.mark.parametrize("size", [1.0, 6.0, 100.0])
def test_softmax_keeps_the_bits_of_what_it_keeps(size):
    scores = rand(7, 300, seed=0, size=size).detach()
    scores[:, 290:] = -math.inf
    expected = scores.softmax(-1)
    expected[expected < smallest_weight(torch.float32)] = 0.0
    found = softmax_of_peaked_(scores.clone())
    kept = (found > 0) & (expected > 0)
    assert torch.equal(found[kept], expected[kept])
    assert float((found - expected).abs().max()) <= 2 * smallest_weight(torch.float32)
    assert not has_denormals(found)


def test_softmax_passes_nan_and_infinity_on_as_torch_does():
    scores = torch.tensor([[0.0, math.nan, 1.0], [math.inf, 0.0, 1.0], [0.0, -math.inf, 0.0]])
    assert torch.equal(softmax_of_peaked_(scores.clone()).isnan(), scores.softmax(-1).isnan())


@pytest.mark.parametrize("size", [3.0, 6.0, 12.0])
def test_softmax_in_context(size):
    q, k, v = (rand(B, N, T, H, seed=i, size=s) for i, s in enumerate((size, size, 1.0)))
    with Denormals() as mode:
        out = sdpa(q, k, v, mask=Mask.full(), scale=1.0, impl="torch")
        out.square().sum().backward()
    assert mode.found == []
    expected = sdpa(*(x.double() for x in (q, k, v)), mask=Mask.full(), scale=1.0, impl="reference")
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decay", [0.97, 0.5, 0.3, 0.2, 0.1, 0.01, 1e-4, 1e-12, 0.0])
@pytest.mark.parametrize("counted", [False, True])
def test_small_decays_forwards_and_backwards(decay, counted):
    tokens = 150
    q, k, v = (rand(B, n, tokens, H, seed=i) for i, n in enumerate((N, K, K)))
    decay_K = torch.full((K,), decay, requires_grad=True)
    counts = torch.tensor([tokens, 71]) if counted else None
    with Denormals() as mode:
        out, _ = linear_attention(q, k, v, decay_K=decay_K, counts_B=counts, impl="torch")
        out.square().sum().backward()
    assert mode.found == []


@pytest.mark.parametrize("size", [4.0, 6.0, 12.0])
def test_decoding_and_its_compressed_form(size):
    q = rand(B, N, 1, H, seed=0, size=size).detach()
    k, v = rand(B, K, T, H, seed=1, size=size).detach(), rand(B, K, T, H, seed=2).detach()
    positions = torch.arange(T).repeat(B, K, 1)
    at_B1 = torch.full((B, 1), T)
    mask = Mask(query_positions_BT=at_B1, key_positions_BKS=positions)
    entries = Entries(keys_BKSC=k, values_BKSV=v, positions_BKS=positions)
    with Denormals() as mode:
        plain = sdpa(q, k, v, mask=mask, impl="torch")
        decoded = paged_decode(q, None, entries, query_positions_BT=at_B1, accumulated_attention=True, impl="torch")
        accumulated = accumulated_attention(q, k, mask=mask, impl="torch")
    assert mode.found == []
    assert not has_denormals(accumulated)
    assert not has_denormals(decoded.accumulated_BKS)
    torch.testing.assert_close(plain, sdpa(q, k, v, mask=mask, impl="reference"), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decoded.out_BNTH, plain, rtol=1e-4, atol=1e-4)


def test_a_query_that_sees_nothing_gets_zeros_and_no_gradient():
    q, k, v = (rand(1, 1, 3, H, seed=i, size=20.0) for i in range(3))
    hidden = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    hidden[..., 1, :] = True
    out = attention_of_peaked(q, k, v, None, hidden, 1.0)
    out.sum().backward()
    assert torch.equal(out[0, 0, 1], torch.zeros(H))
    assert torch.equal(q.grad[0, 0, 1], torch.zeros(H))
    assert all(bool(x.grad.isfinite().all()) for x in (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_kept_weights_are_normal(dtype):
    least = torch.tensor(smallest_weight(dtype), dtype=dtype)
    assert not has_denormals(torch.nextafter(least, torch.tensor(1.0, dtype=dtype)) ** 2)
    assert float(without_negligible(least)) == 0.0
