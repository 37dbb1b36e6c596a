"""The engines against plain sums: classes of keys, single keys, entries of evicted and merged caches, empty rows."""

import math
import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from attnzoo.attention.edits import (
    Add,
    EditRun,
    Edits,
    Entropy,
    Except,
    HeadFilter,
    Hide,
    KeySums,
    LayerSizes,
    Map,
    Mass,
    Move,
    PutScores,
    PutWeights,
    Raise,
    Scale,
    Span,
    TokenLayout,
    TopKeys,
    Where,
    engine,
    layer_plan,
)
from attnzoo.attention.edits import run as edits_run
from attnzoo.attention.edits.engine import AttentionCall
from attnzoo.attention.edits.few import few_changes
from attnzoo.attention.edits.items import Here, ScoreEdit, WeightEdit
from attnzoo.attention.edits.order import weighed
from attnzoo.attention.edits.placed import Placed
from attnzoo.ops.common.masks import Mask
from tests.helpers.edits_cases import HEADS, LAYOUT, SINKS, TOKENS, drawn_items
from tests.helpers.edits_oracle import Oracle

WIDTH = 5
FOUND = torch.tensor([0, 2, 3])
"""Positions of sinks."""


def sizes(kv_heads, **options):
    size = {"num_heads": HEADS, "num_kv_heads": kv_heads, "head_dim": WIDTH, "variant": "mha", "model_dim": 9}
    return [LayerSizes(**size | options)]


def random_call(kv_heads, seed, *, per_head_keys=False, counts=False):
    """(call, plain scores, visible, values of query heads, positions by query head) of two rows, as a cache that lost
    and merged entries shows them."""
    torch.manual_seed(seed)
    q, k, v = (torch.randn(2, n, t, WIDTH, dtype=torch.float64) for n, t in ((HEADS, 4), (kv_heads, 9), (kv_heads, 9)))
    queries_BT = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    shape = (2, kv_heads if per_head_keys else 1)
    keys_BKS = torch.stack([torch.stack([torch.randperm(TOKENS)[:9] for _ in range(shape[1])]) for _ in range(2)])
    keys_BKS[:, :, 4] = -1
    log_counts = torch.rand(2, kv_heads, 9, dtype=torch.float64).mul(3).add(1).round().log() if counts else None
    bias = torch.randn(2, HEADS, 4, 9, dtype=torch.float64) if counts else None

    def terms(q_BNRH, mask):
        rows = [(int(at.min() >= 7), at) for at in mask.query_positions_BT]
        return q_BNRH, None if bias is None else torch.stack([bias[row][:, at - (7 if row else 3)] for row, at in rows])

    mask = Mask(query_positions_BT=queries_BT, key_positions_BKS=keys_BKS)
    call = AttentionCall(q, k, v, mask, terms, 0.4, Placed(queries_BT), keys_BKS, log_counts)
    group = HEADS // kv_heads
    scores = 0.4 * q @ k.repeat_interleave(group, 1).mT + (0 if bias is None else bias)
    if log_counts is not None:
        scores = scores + log_counts.repeat_interleave(group, 1)[:, :, None]
    keys_BNS = keys_BKS.expand(2, kv_heads, 9).repeat_interleave(group, 1)
    visible = (keys_BNS[:, :, None] >= 0) & (keys_BNS[:, :, None] <= queries_BT[:, None, :, None])
    return call, scores, visible, v.repeat_interleave(group, 1), keys_BNS


def run(items, call, kv_heads, out, rows=(True, True), **options):
    """(new outputs, runs) of one call of one layer."""
    plan = Edits(*items).plan(sizes(kv_heads, **options), LAYOUT, TOKENS - LAYOUT.prompt)
    runs = [EditRun(plan) if row else None for row in rows]
    layer = layer_plan(runs, 0)
    if layer is None:
        return out, runs
    for entry in filter(None, layer.rows):
        entry.record.sets(call.q_BNTH.device).observe(
            {SINKS: torch.arange(TOKENS)[:, None].eq(FOUND).any(1)}, 0, TOKENS
        )
    return layer.apply(call, out), runs


@pytest.mark.parametrize(("kv_heads", "per_head", "counts"), [(4, False, False), (2, True, True), (1, False, True)])
@pytest.mark.parametrize(("dense", "few"), [(False, 1), (False, 16), (True, 1)])
def test_random_lists_of_edits(kv_heads, per_head, counts, dense, few, monkeypatch):
    """Kills: kv head for query head; order swapped; renormalise dropped; a hidden or empty entry read; an empty
    class."""
    monkeypatch.setattr(engine, "FEW", few)
    engines = set()
    for seed in range(12):
        draw = random.Random(seed)
        items = drawn_items(draw, dense)
        call, scores, visible, values, keys = random_call(kv_heads, seed, per_head_keys=per_head, counts=counts)
        out = torch.full((2, HEADS, 4, WIDTH), 99.0, dtype=torch.float64)
        found, runs = run([*items, Mass(bins={"i": "image", "s": SINKS})], call, kv_heads, out)
        engines |= runs[0].records[0].engines
        for row in range(2):
            oracle = Oracle(items, LAYOUT, TOKENS, sinks={SINKS: set(FOUND.tolist())})
            queries = call.queries.numbers[row]
            arrays = (scores[row].numpy(), visible[row].numpy(), values[row].numpy())
            expected, weights, edited = oracle.run(*arrays, queries, keys[row].tolist())
            named = {(n, t) for item in items for n, t, _, _ in oracle.rows(item, HEADS, queries)}
            for n in range(HEADS):
                for t in range(4):
                    aim = expected[n, t] if (n, t) in named else np.full(WIDTH, 99.0)
                    np.testing.assert_allclose(found[row, n, t].numpy(), aim, rtol=1e-9, atol=1e-9, err_msg=str(items))
            image = [[(weights[n, t] * np.isin(keys[row][n], [1, 2, 3])).sum() for t in range(4)] for n in range(HEADS)]
            np.testing.assert_allclose(runs[row].reading[0].mass["i"], image, atol=1e-6)
            blind = {(n, queries[t]) for n in range(HEADS) for t in range(4) if not np.isfinite(edited[n, t]).any()}
            assert set(runs[row].reading[0].empty) == blind
    assert "dense" in engines if dense or few > 1 else "partitioned" in engines


@pytest.mark.parametrize("case", ["several items", "a move alone", "a move alone, entries in any order"])
def test_rows_that_do_the_same_are_one_pass(case, monkeypatch):
    """Rows whose spans, sinks and lengths differ, at once and one by one. Kills: a row's classes, queries or reads
    taken for another's; a pass over the row without edits; a weight too small for its share lost in float32; a sink
    found after a call left out of the next one; what was joined of other rows."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(5, n, t, WIDTH, dtype=torch.float64) for n, t in ((HEADS, 2), (2, 11), (2, 11)))
    q[4] *= 30
    last = torch.tensor([10, 8, 9, 10, 7])
    queries_BT = last[:, None] + torch.tensor([-1, 0])
    keys_BKS = torch.where(torch.arange(11) <= last[:, None], torch.arange(11), -1)[:, None]
    if "any order" in case:
        order = torch.randperm(11)
        k, v, keys_BKS = k[:, :, order], v[:, :, order], keys_BKS[..., order]
    mask = Mask(query_positions_BT=queries_BT, key_positions_BKS=keys_BKS)
    call = AttentionCall(q, k, v, mask, lambda q, _: (q, None), 0.4, Placed(queries_BT), keys_BKS)
    items = [
        Move(Where(heads="1:", keys=SINKS), "image", 0.6),
        Add(Where(heads=[1, 2], queries=Span(8, 10)), 0.5),
        Raise(Where(keys="image"), 0.3),
        Mass(Where(queries=Span(8, 11)), bins={"image": "image", "sinks": SINKS}),
    ]
    if case != "several items":
        heads = "1:" if "any order" in case else "all"
        items = [
            Move(Where(heads=heads, keys=SINKS), "image", 0.6, HeadFilter(of="image", min_mass=0.1, min_share=0.2))
        ]
    layouts = [TokenLayout(7, {"image": (n, n + 3)}) for n in range(5)]
    plans = [Edits(*items).plan(sizes(2), layout, 4) for layout in layouts]
    passes = []

    def spy(call, rows, *more):
        passes.append((rows.start, rows.stop))
        return few_changes(call, rows, *more)

    def changed(call, rows):
        runs = [None if n == 2 else EditRun(plans[n]) for n in rows]
        layer = layer_plan(runs, 0)
        for n, run in zip(rows, runs, strict=True):
            if run is not None:
                run.records[0].sets(q.device).observe({SINKS: torch.arange(5) % 5 == n}, 0, 5)
        if len(items) == 1:
            layer.apply(call, torch.full_like(call.q_BNTH, 99.0))
        for n, run in zip(rows, runs, strict=True):
            if run is not None:
                run.records[0].sets(q.device).observe({SINKS: torch.arange(5, 11) % 5 == n}, 5, 6)
        return layer.apply(call, torch.full_like(call.q_BNTH, 99.0)), runs

    monkeypatch.setattr(edits_run, "few_changes", spy)
    found, runs = changed(call, range(5))
    half = replace(call, q_BNTH=q.float(), keys_BKSH=k.float(), values_BKSH=v.float())
    single, _ = changed(half, range(5))
    torch.testing.assert_close(single.double(), found, rtol=1e-4, atol=1e-4)
    assert passes == [(0, 2), (3, 5)] * (4 if len(items) == 1 else 2)
    assert (found[2] == 99).all()
    assert (found[[0, 1, 3, 4]] != 99).any()
    if len(items) == 1:
        others = torch.tensor([0, 3])
        placed = Mask(query_positions_BT=queries_BT[others], key_positions_BKS=keys_BKS[others])
        cut = AttentionCall(
            *(x[others] for x in (q, k, v)), placed, call.terms, 0.4, Placed(queries_BT[others]), keys_BKS[others]
        )
        beside = layer_plan([runs[0], runs[3]], 0).apply(cut, torch.full_like(cut.q_BNTH, 99.0))
        torch.testing.assert_close(beside, found[others], rtol=1e-9, atol=1e-9)
    monkeypatch.setattr(engine, "FEW", 1)
    for n in (0, 1, 3, 4):
        row = slice(n, n + 1)
        placed = Mask(query_positions_BT=queries_BT[row], key_positions_BKS=keys_BKS[row])
        alone, (run,) = changed(
            AttentionCall(q[row], k[row], v[row], placed, call.terms, 0.4, Placed(queries_BT[row]), keys_BKS[row]), [n]
        )
        torch.testing.assert_close(found[n], alone[0], rtol=1e-9, atol=1e-9)
        read = [made.reading[0].results if len(items) > 1 else () for made in (runs[n], run)]
        for one, other in zip(*read, strict=True):
            assert one.queries_Q.tolist() == other.queries_Q.tolist()
            assert all(torch.allclose(one.values[name], other.values[name], atol=1e-6) for name in one.values)


@pytest.mark.parametrize(("dense", "few"), [(False, 1), (False, 16), (True, 1)])
def test_keys_of_next_to_no_weight(dense, few, monkeypatch):
    """In each engine against float64: less than 1e-34 of a row is no weight. Such keys are not raised, receive nothing,
    and leave a row without any. Kills: a division by a number so small that it overflows; engines that disagree."""
    monkeypatch.setattr(engine, "FEW", few)
    call, scores, visible, values, keys = random_call(2, 0)
    call = replace(call, **{name: getattr(call, name).float() for name in ("q_BNTH", "keys_BKSH", "values_BKSH")})
    image = ((keys >= 1) & (keys < 4))[:, :, None]
    lists = (
        [Raise(Where(keys="image"), 0.5)],
        [Scale(Where(keys=Except("image")), 0.0)],
        [Move(Where(keys=Except("image")), "image", 1.0)],
        [Raise(Where(keys="image"), 0.5), Scale(Where(keys="image"), 1e19, renormalise=False)],
    )
    compared = [0, 0]
    for value in (-55.0, -66.0, -75.0, -80.0, -84.0, -88.0, -96.0, -104.0, -120.0):
        weights = (scores + value * image).masked_fill(~visible, -math.inf).softmax(-1)
        theirs = (weights * image).sum(-1, keepdim=True)
        some = theirs >= 1e-34
        clear = ((theirs < 1e-35) | (theirs > 1e-33))[..., 0]
        alone = weights * image / theirs.clamp(min=1e-300)
        raised = torch.where(some & (theirs < 0.5), weights * (0.5 / theirs.clamp(min=1e-300)), weights)
        raised = torch.where(image, raised, weights)
        raised = raised / raised.sum(-1, keepdim=True)
        expected = (
            raised,
            torch.where(some, alone, 0.0),
            torch.where(some, alone, weights),
            torch.where(image, raised * 1e19, raised),
        )
        for items, aim in zip(lists, expected, strict=True):
            reads = [Mass(bins={"image": "image"}), *([Map(dtype="fp32")] if dense else [])]
            added = [Add(Where(keys="image"), value), *items]
            found, runs = run(
                [*added, *(reads if len(items) == 1 else reads[1:])], call, 2, torch.zeros_like(call.q_BNTH)
            )
            assert runs[0].records[0].engines == {"dense" if dense or few > 1 else "partitioned"}
            out = aim @ values
            scale = out.abs().amax(-1, keepdim=True).clamp(min=1.0)
            torch.testing.assert_close((found.double() / scale)[clear], (out / scale)[clear], rtol=1e-4, atol=1e-5)
            if len(items) == 1:
                masses = torch.stack([each.reading[0].mass["image"] for each in runs]).double()
                torch.testing.assert_close(masses[clear], (aim * image).sum(-1)[clear], rtol=1e-4, atol=1e-6)
        compared[0] += int((some[..., 0] & clear).sum())
        compared[1] += int((~some[..., 0] & clear).sum())
    assert min(compared) > 50


def test_a_move_of_large_weights_gives_nothing_to_next_to_none():
    """What an edit before it has enlarged. Kills: a receiver that has some weight, but none beside what is given."""
    giving, shown = torch.tensor([[[True, False]]]), torch.ones(1, 1, 2, dtype=torch.bool)
    here = Here(shown[..., :1], shown, {"keys": giving, "to": ~giving})
    none, some = (torch.tensor([[[1e6, weight]]]) for weight in (1e-33, 1e-20))
    move = Move(Where(keys=0), 1, 1.0)
    assert torch.equal(move.apply(none, here), none)
    torch.testing.assert_close(move.apply(some, here), torch.tensor([[[0.0, 1e6]]]))


def test_reads_are_what_the_map_says():
    """Kills: columns by slot instead of position; the source's row; sums over the wrong axis."""
    items = [Add(Where(keys="image"), 0.7)]
    at = Where(heads=[1, 3], queries=Span(3, 6))
    reads = [
        Map(at, dtype="fp64"),
        Map(at, what="scores", dtype="fp64"),
        TopKeys(at, 3),
        KeySums(at),
        Entropy(at),
        Mass(at),
    ]
    call, scores, visible, values, keys = random_call(2, 3, per_head_keys=True)
    _, runs = run([*items, *reads], call, 2, torch.zeros(2, HEADS, 4, WIDTH, dtype=torch.float64))
    _, weights, edited = Oracle(items, LAYOUT, TOKENS).run(
        scores[0].numpy(), visible[0].numpy(), values[0].numpy(), [3, 4, 5, 6], keys[0].tolist()
    )
    expected, logits = np.zeros((2, 3, TOKENS)), np.full((2, 3, TOKENS), -math.inf)
    for row, n in enumerate((1, 3)):
        for t in range(3):
            for s, key in enumerate(keys[0][n].tolist()):
                if key >= 0:
                    expected[row, t, key], logits[row, t, key] = weights[n, t, s], edited[n, t, s]
    reading = runs[0].reading[0]
    np.testing.assert_allclose(reading.map, expected, atol=1e-12)
    np.testing.assert_allclose(reading.results[1].values["map"], logits, atol=1e-12)
    np.testing.assert_allclose(reading.key_sums, expected.sum(1), atol=1e-6)
    np.testing.assert_allclose(reading.mass["keys"], expected.sum(-1), atol=1e-6)
    log = np.log(np.where(expected > 0, expected, 1.0))
    np.testing.assert_allclose(reading.entropy, -(expected * log).sum(-1), atol=1e-6)
    order = np.argsort(-expected, axis=-1, kind="stable")[..., :3]
    largest = np.take_along_axis(expected, order, -1)
    np.testing.assert_allclose(reading.top["weights"], largest, atol=1e-6)
    np.testing.assert_array_equal(reading.top["positions"], np.where(largest > 0, order, -1))
    assert reading.results[0].queries_Q.tolist() == [3, 4, 5]
    held = keys[0].tolist()
    for n in range(HEADS):
        there = [n for n in held[n] if n >= 0]
        assert reading.stands_for_NS[n].nonzero()[:, 0].tolist() == sorted(there)
        assert reading.evicted[n].sum() == reading.positions_S.numel() - len(there)


def test_only_what_is_named_changes_and_bytes_are_as_said():
    """Kills: outputs of unnamed rows, heads and queries that are computed anew; bytes that differ from the cost."""
    items = [Scale(Where(heads=[2], queries=Span(4, 6), keys="image"), 2.0), Add(Where(heads=[0], queries=5), 1.0)]
    reads = [Map(Where(keys="text")), TopKeys(Where(heads="1:3"), 2), Mass(bins={"a": "image", "b": "text"})]
    call, *_ = random_call(2, 1)
    out = torch.randn(2, HEADS, 4, WIDTH, dtype=torch.float64)
    found, _ = run([*items, *reads], call, 2, out, rows=(True, False))
    changed = {tuple(at) for at in (found != out).any(-1).nonzero().tolist()}
    assert changed == {(0, 2, 1), (0, 2, 2), (0, 0, 2)}
    only_reads, _ = run(reads, call, 2, out)
    assert torch.equal(only_reads, out)
    whole = Edits(*reads).plan(sizes(2), TokenLayout(4, {"image": (1, 4), "text": (0, 2)}), 0)
    one_run = EditRun(whole)
    short = random_call(2, 1)[0]
    first = AttentionCall(
        short.q_BNTH[:1], short.keys_BKSH[:1, :, :4], short.values_BKSH[:1, :, :4], Mask(), lambda q, m: (q, None), 0.4,
        Placed(torch.arange(4)[None]), torch.arange(4)[None, None],
    )  # fmt: skip
    layer_plan([one_run], 0).apply(first, out[:1])
    assert one_run.reading.nbytes == whole.cost.returned_bytes
    assert whole.cost.layers[0].engine == "dense"


def test_half_precision_and_gradients():
    """Kills: a class without keys in half precision; gradients cut by the fused pass."""
    call, *_ = random_call(2, 5)
    items = [Move(Where(keys="image"), "text", 0.5), Hide(Where(keys=0))]
    exact, _ = run(items, call, 2, torch.zeros(2, HEADS, 4, WIDTH, dtype=torch.float64))
    for dtype in (torch.bfloat16, torch.float16):
        small = [x.to(dtype) for x in (call.q_BNTH, call.keys_BKSH, call.values_BKSH)]
        half = AttentionCall(*small, call.mask, call.terms, call.scale, call.queries, call.positions_BKS)
        found, _ = run(items, half, 2, torch.zeros(2, HEADS, 4, WIDTH, dtype=dtype))
        torch.testing.assert_close(found.double(), exact, rtol=0.05, atol=0.05)
    q = call.q_BNTH.clone().requires_grad_()
    with_grad = AttentionCall(
        q, call.keys_BKSH, call.values_BKSH, call.mask, call.terms, call.scale, call.queries, call.positions_BKS
    )
    found, runs = run([*items, Mass(bins={"image": "image"})], with_grad, 2, torch.zeros_like(exact))
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)
    (found.sum() + runs[0].reading[0].mass["image"].sum()).backward()
    assert torch.isfinite(q.grad).all()
    assert (q.grad != 0).any()


@dataclass(frozen=True)
class Flood(WeightEdit):
    """An edit that keeps to nothing."""

    def apply(self, x_NRS, here):
        return torch.ones_like(x_NRS)


@dataclass(frozen=True)
class Show(ScoreEdit):
    def apply(self, x_NRS, here):
        return torch.zeros_like(x_NRS)


def test_no_edit_shows_what_is_hidden():
    """Kills: an order that trusts edits to keep to the mask."""
    visible = torch.tensor([[[True, False, True], [False, False, False]]])
    found = weighed(torch.randn(2, 2, 3), visible, [(Show(Where()), None)])
    torch.testing.assert_close(found.weights_NRS[:, 0], torch.tensor([[0.5, 0.0, 0.5]] * 2))
    assert (found.weights_NRS[:, 1] == 0).all()
    assert found.empty_NR1[..., 0].tolist() == [[False, True]] * 2
    flooded = weighed(torch.randn(2, 2, 3), visible, [(Flood(Where()), None)])
    assert torch.equal(flooded.weights_NRS.bool(), visible.expand(2, -1, -1))


def test_a_window_pairs_and_padding_hide_what_edits_may_not_show():
    """Kills: an edit that shows a key which the mask hides; left padding counted as positions."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, HEADS, 6, WIDTH) for _ in range(3))
    starts = torch.tensor([[0, 1, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0]])
    pairs = torch.rand(2, HEADS, 6, 6) < 0.6
    mask = Mask(window=3, sinks=1, starts_BT=starts, pairs=pairs)
    queries = torch.tensor([[-1, -1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]])
    call = AttentionCall(q, k, v, mask, lambda q, m: (q, None), 0.4, Placed(queries), queries[:, None])
    layout = TokenLayout(4)
    edits = [PutScores(Where(), torch.full((1, 6, 6), 5.0).tolist()), PutWeights(Where(), torch.ones(1, 6, 6).tolist())]
    runs = [EditRun(Edits(*edits, Map(dtype="fp32")).plan(sizes(HEADS), layout, 2)) for _ in range(2)]
    out = layer_plan(runs, 0).apply(call, torch.full_like(q, 7.0))
    visible = mask.visible(6, 6, q.device)
    assert (out[0, :, :2] == 7).all()  # padding
    for row, begin in ((0, 2), (1, 0)):
        seen = visible[row, :, begin:, begin:].float()
        size = 6 - begin
        torch.testing.assert_close(runs[row].reading[0].map[..., :size], seen)
        torch.testing.assert_close(out[row, :, begin:], seen @ v[row, :, begin:])
