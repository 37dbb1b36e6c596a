"""One entry of every kv head in place, and products with cached entries in each of their forms."""

import pytest
import torch

from attnzoo.ops.common import products
from attnzoo.ops.common.products import with_keys, with_values
from attnzoo.ops.common.rows import places, places_or_none

B, K, P, X = 3, 2, 7, 5


def buffers() -> list[torch.Tensor]:
    """Dense ones, and views of larger ones."""
    return [
        torch.randn(B, K, P),
        torch.randn(B, K, P, X),
        torch.randn(B, K, P + 4)[:, :, :P],
        torch.randn(B, K, P + 4, X)[:, :, :P],
    ]


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("some", [False, True])
def test_places_read_and_write_one_entry_a_head(which, some):
    x = buffers()[which]
    place = torch.randint(P, (B, K))
    given = place.clone()
    if some:
        given[1, 0] = -1
    where = places_or_none(given, P)
    assert (where.meant_BK is None) == (not some)
    new = torch.randn(B, K, *x.shape[3:], dtype=torch.float64)
    expected = x.clone()
    for b in range(B):
        for k in range(K):
            if given[b, k] >= 0:
                assert torch.equal(where.take(x)[b, k], x[b, k, given[b, k]])
                expected[b, k, given[b, k]] = new[b, k].to(x.dtype)
    where.put(x, new)
    assert torch.equal(x, expected)
    if x.dim() == 3:
        where.fill(x, 9.0)
        assert int((x == 9.0).sum()) == B * K - int(some)


def test_places_that_are_read_may_be_meant_elsewhere():
    x, place = torch.zeros(B, K, P), torch.full((B, K), 6)
    meant = torch.tensor([[True], [False], [True]]).expand(B, K)
    places(place, P, meant).put(x, torch.ones(B, K))
    assert x[:, :, 6].sum(1).tolist() == [2, 0, 2]
    assert float(x.sum()) == 4


def width(dtype: torch.dtype) -> int:
    return dtype.itemsize


def assert_sums_close(actual, expected, magnitudes, terms: int, dtype: torch.dtype) -> None:
    """Sums in any order: each of their terms may be rounded once an addition (Higham 2002, section 3.1)."""
    allowed = terms * torch.finfo(dtype).eps * magnitudes
    assert bool(((actual.double() - expected).abs() <= allowed).all())


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spare", [0, 6])
def test_products_in_every_form(native, dtype, spare, monkeypatch):
    monkeypatch.setattr(products, "_native", lambda _: native)
    monkeypatch.setattr(products, "COPIED_BYTES", 2 * K * P * X * 4)  # two sequences, then one
    entries = torch.randn(B, K, P + spare, X).to(dtype)[:, :, :P]
    rows, weights = torch.randn(B, K, 4, X).to(dtype), torch.rand(B, K, 4, P)
    scores, sums = with_keys(rows, entries), with_values(weights, entries)
    right = rows.double() @ entries.double().mT
    assert_sums_close(scores, right, rows.double().abs() @ entries.double().abs().mT, X, dtype)
    # Weights are float32 and are rounded to the dtype of the values.
    totals = weights.double() @ entries.double().abs()
    assert_sums_close(sums, weights.double() @ entries.double(), totals, P, min(dtype, torch.float32, key=width))
    half = dtype in (torch.float16, torch.bfloat16)
    assert scores.dtype == (torch.float32 if half and not native else dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_products_with_a_single_entry(dtype):
    """What a full cache has after one token, and what D2O's ring holds."""
    entry = torch.randn(B, K, P, X).to(dtype)[:, :, 3:4]
    rows, weights = torch.randn(B, K, 4, X).to(dtype), torch.rand(B, K, 4, 1)
    scores, sums = with_keys(rows, entry), with_values(weights, entry)
    assert (scores.shape, sums.shape) == ((B, K, 4, 1), (B, K, 4, X))
    exact = torch.promote_types(dtype, torch.float32)
    assert scores.dtype == sums.dtype == exact
    torch.testing.assert_close(scores, rows.to(exact) @ entry.to(exact).mT)
    torch.testing.assert_close(sums, weights.to(exact) * entry.to(exact))


def test_products_of_no_sequences(monkeypatch):
    monkeypatch.setattr(products, "_native", lambda _: False)
    none = torch.zeros(2, K, 0, X, dtype=torch.bfloat16)
    assert with_keys(torch.zeros(2, K, 4, X, dtype=torch.bfloat16), none).shape == (2, K, 4, 0)
    assert with_values(torch.zeros(2, K, 4, 0), none).eq(0).all()
