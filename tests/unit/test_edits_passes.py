"""Attention class by class against plain sums, of classes of few keys (products) and of many (fused passes)."""

import itertools

import pytest
import torch

from attnzoo.attention.edits import order, passes
from attnzoo.attention.edits.passes import ByClass, class_passes
from tests.helpers.edits_cases import HEADS

KEYS, ROWS, WIDTH, CLASSES = 90, 7, 8, 4


def case(kv_heads, heads_see, bias, seed):
    """(content, keys, values, class of each key, visible, added): class 1 has no key; query 0 sees none of class 2."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    content, keys, values = draw(HEADS, ROWS, WIDTH), draw(kv_heads, KEYS, WIDTH), draw(kv_heads, KEYS, WIDTH)
    class_S = torch.tensor([0, 2, 3])[torch.randint(3, (KEYS,), generator=generator)]
    visible = torch.rand(heads_see, ROWS, KEYS, generator=generator) < 0.7
    visible[:, 0] &= class_S != 2
    visible[:, 3] = False
    added = draw(HEADS, ROWS, KEYS) * 3 if bias else None
    return content, keys, values, class_S, visible, added


def plain(content, keys, values, class_S, visible, added, weights_NRC=None):
    """(lse_NRC, out_NRH of classes with the given weights) in float64."""
    group = HEADS // len(keys)
    content, keys, values = (x.double() for x in (content, keys, values))
    keys, values = (x.repeat_interleave(group, 0) for x in (keys, values))
    scores = content @ keys.mT * 0.3 + (0 if added is None else added.double())
    scores = scores.masked_fill(~visible, -torch.inf)
    lse, total = [], torch.zeros(HEADS, ROWS, WIDTH, dtype=torch.float64)
    for number in range(CLASSES):
        mine = scores[..., class_S == number]
        lse.append(mine.logsumexp(-1))
        if weights_NRC is not None:
            total += weights_NRC[..., number, None] * (mine.softmax(-1).nan_to_num() @ values[:, class_S == number])
    return torch.stack(lse, -1), total


@pytest.mark.parametrize("few_keys", [0, 25, 64])
def test_small_and_large_classes_are_sums_over_their_keys(monkeypatch, few_keys):
    monkeypatch.setattr(passes, "FEW_KEYS", few_keys)
    for seed, (kv_heads, heads_see, bias) in enumerate(itertools.product((1, HEADS), (1, HEADS), (False, True))):
        content, keys, values, class_S, visible, added = drawn = case(kv_heads, heads_see, bias, seed)
        held = ByClass.of(keys, values, class_S, CLASSES)
        ordered = None if added is None else held.sorted(added)
        found = class_passes(content, held, held.sorted(visible), ordered, 0.3)
        weights = torch.rand(HEADS, ROWS, CLASSES, generator=torch.Generator().manual_seed(seed))
        lse, _ = plain(*drawn)
        weights = weights.masked_fill(lse == -torch.inf, 0.0)
        _, out = plain(*drawn, weights)
        torch.testing.assert_close(found.lse_NRC.double(), lse, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.total(weights).double(), out, rtol=1e-5, atol=1e-5)
        sizes = class_S.bincount(minlength=CLASSES).tolist()
        assert [number for number, _ in found.many] == [n for n, size in enumerate(sizes) if size > few_keys]


def test_where_no_query_sees_a_key_outputs_are_zeros():
    content, keys, values, class_S, visible, _ = case(1, 1, False, 0)
    held = ByClass.of(keys, values, class_S, CLASSES)
    found = class_passes(content, held, torch.zeros_like(visible), None, 0.3)
    assert torch.equal(found.lse_NRC, torch.full((HEADS, ROWS, CLASSES), -torch.inf))
    assert torch.equal(found.total(torch.ones(HEADS, ROWS, CLASSES)), torch.zeros(HEADS, ROWS, WIDTH))


@pytest.mark.parametrize("keys", [1, 5, order.NARROW, order.NARROW + 1])
def test_weights_of_few_and_many_columns_are_a_softmax(keys):
    scores = torch.randn(3, 6, keys, generator=torch.Generator().manual_seed(1))
    visible = torch.ones(3, 6, keys, dtype=torch.bool)
    visible[:, 2, 0] = False
    weights = order.weighed(scores, visible, []).weights_NRS
    expected = scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num()
    torch.testing.assert_close(weights, expected)
