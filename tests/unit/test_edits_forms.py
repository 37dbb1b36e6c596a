"""Edits in every form of every variant, against the papers' formulas with edits written into their softmax:
the parallel form, any partition, mixed batches, left padding, a window, a context."""

import random
from unittest import mock

import numpy as np
import pytest
import torch

from attnzoo.attention import build_attention
from attnzoo.attention.edits import (
    Add,
    EditRun,
    Edits,
    Entropy,
    Hide,
    KeySums,
    Map,
    Mass,
    Move,
    PutScores,
    PutWeights,
    Scale,
    Sinks,
    Span,
    TokenLayout,
    TopKeys,
    Where,
    engine,
    layer_plan,
    layer_sizes,
)
from attnzoo.ops.common.masks import Mask, document_starts, padding_starts
from tests.contract import by_hand
from tests.helpers.edits_cases import HEADS, LAYOUT, SINKS, TOKENS, drawn_items
from tests.helpers.edits_oracle import Oracle
from tests.helpers.serving import small_model

DIM = 22
VARIANTS = {
    "gqa": {"kind": "mha", "num_kv_heads": 2, "head_dim": 6},
    "one_kv_head": {"kind": "mha", "num_kv_heads": 1, "head_dim": 6, "qk_norm": True},
    "window": {"kind": "mha", "num_kv_heads": 2, "head_dim": 6, "window": 3, "sinks": 2},
    "table": {"kind": "rmha", "num_kv_heads": 2, "head_dim": 5, "max_distance": 6},
    "sinusoid": {"kind": "rmha", "head_dim": 5, "position": "sinusoid"},
    "mdha": {"kind": "mdha", "head_dim": 6, "num_kv_heads": 2},
    "rcmha": {"kind": "rcmha", "num_kv_heads": 2, "head_dim": 5, "max_distance": 6, "window": 5, "sinks": 1},
}


def built(name):
    torch.manual_seed(3)
    options = dict(VARIANTS[name])
    kind = options.pop("kind")
    layer = build_attention(kind, {"model_dim": DIM, "num_heads": HEADS} | options).double().requires_grad_(False)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.4)
    return kind, layer


def plain(kind, layer, x_TD, items, context_SD=None, seen=None, layout=LAYOUT, total=TOKENS):
    """(y_TD, weights_NTS) by the paper's formula, with edits in its softmax."""
    sizes = x_TD.pow(2).mean(-1).sqrt()
    sinks = {SINKS: {t for t in range(len(x_TD)) if x_TD[t, 2].abs() >= SINKS.tau * sizes[t]}}
    kept = {}

    def attend(config, q, v, score, seen):
        see = seen or (lambda i, j: by_hand.sees(config, i, j))
        scores = np.array([[[score(n, i, j) for j in range(len(v))] for i in range(len(q))] for n in range(HEADS)])
        visible = np.array([[see(i, j) for j in range(len(v))] for i in range(len(q))])
        values = np.repeat(v.transpose(1, 0, 2), HEADS // v.shape[1], axis=0)
        at = list(range(len(v)))
        oracle = Oracle(items, layout, total, sinks=sinks)
        visible = np.broadcast_to(visible, scores.shape)
        out, kept["weights"], _ = oracle.run(
            scores / q.shape[2] ** 0.5, visible, values, list(range(len(q))), [at] * HEADS
        )
        return out.transpose(1, 0, 2)

    weights = {name: value.numpy() for name, value in layer.state_dict().items()}
    more = () if context_SD is None and seen is None else (context_SD, seen)
    with mock.patch.object(by_hand, "attend", attend):
        y_TD = by_hand.BY_HAND[kind](layer.config, weights, x_TD.numpy(), *more)
    return y_TD, kept["weights"]


def runs_of(layer, lists, layout=LAYOUT, total=TOKENS, **options):
    sizes = [layer_sizes(layer, **options)]
    plans = [None if items is None else Edits(*items).plan(sizes, layout, total - layout.prompt) for items in lists]
    return [None if plan is None else EditRun(plan) for plan in plans]


def streamed(layer, x_BTD, runs, cuts, counts_B=None):
    """y_BTD by `extend` over the chunks between the cuts."""
    state, outs, done = layer.init_state(len(x_BTD), 0), [], 0
    for end in (*cuts, x_BTD.shape[1]):
        if end > done:
            chunk = None if counts_B is None else (counts_B - done).clamp(0, end - done)
            y, state = layer.extend(x_BTD[:, done:end], state, chunk, edits=layer_plan(runs, 0))
            outs.append(y)
            done = end
    return torch.cat(outs, 1)


READS = [Mass(bins={"image": "image", "sinks": SINKS}), Map(dtype="fp64")]


@pytest.mark.parametrize("name", VARIANTS)
def test_random_edits_in_every_form(name, monkeypatch):
    """Kills: decode that skips edits; a chunk's positions off by one; a kv head for a query head; the order swapped;
    padding counted; rows of a mixed batch that take each other's edits."""
    monkeypatch.setattr(engine, "FEW", 3)  # chunks of one and two tokens the one way, longer ones the other
    kind, layer = built(name)
    for seed in range(4):
        draw = random.Random(seed)
        lists = [drawn_items(draw, dense=seed % 2 == 0), None, drawn_items(draw, dense=seed > 2)]
        reads = READS if seed % 2 == 0 else READS[:1]
        lists = [None if items is None else [*items, *reads] for items in lists]
        torch.manual_seed(seed)
        x = torch.randn(3, TOKENS, DIM, dtype=torch.float64)
        x[:, [0, 2, 8], 2] = 9.0
        expected = [plain(kind, layer, row, items or []) for row, items in zip(x, lists, strict=True)]
        off = layer(x)
        cuts = sorted(draw.sample(range(1, TOKENS), draw.randrange(0, 5)))
        off_streamed = streamed(layer, x, None, cuts)
        forward_runs, stream_runs = runs_of(layer, lists), runs_of(layer, lists)
        found = layer(x, edits=layer_plan(forward_runs, 0))
        in_chunks = streamed(layer, x, stream_runs, cuts)
        lengths = torch.tensor([TOKENS, 4, TOKENS])
        ragged_runs = runs_of(layer, lists)
        ragged = streamed(layer, x, ragged_runs, cuts, lengths)
        for row, (y, weights) in enumerate(expected):
            for form, runs in ((found, forward_runs), (in_chunks, stream_runs), (ragged, ragged_runs)):
                real = int(lengths[row]) if form is ragged else TOKENS
                np.testing.assert_allclose(form[row, :real], y[:real], rtol=1e-8, atol=1e-8, err_msg=str((seed, lists)))
                if runs[row] is None:
                    continue
                reading = runs[row].reading[0]
                image = weights[:, :, 1:4].sum(-1)
                np.testing.assert_allclose(reading.mass["image"], image, atol=1e-6)
                if len(reads) == 2:
                    np.testing.assert_allclose(reading.map, weights, atol=1e-9)
        assert torch.equal(found[1], off[1])
        assert torch.equal(in_chunks[1], off_streamed[1])


@pytest.mark.parametrize("name", ["gqa", "rcmha"])
def test_left_padding(name):
    """Kills: positions counted from the padding's begin."""
    kind, layer = built(name)
    items = [Add(Where(queries=Span(2, 6), keys="image"), 1.0), Scale(Where(keys=0, queries=-1), 3.0), READS[1]]
    row = torch.randn(TOKENS - 2, DIM, dtype=torch.float64)
    x = torch.cat([torch.randn(2, DIM, dtype=torch.float64), row])[None]
    runs = runs_of(layer, [items], total=TOKENS - 2)
    starts = padding_starts(torch.tensor([TOKENS - 2]), TOKENS, "left")
    found = layer(x, mask=Mask(starts_BT=starts), edits=layer_plan(runs, 0))
    y, weights = plain(kind, layer, row, items, total=TOKENS - 2)
    np.testing.assert_allclose(found[0, 2:], y, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(runs[0].reading[0].map, weights, atol=1e-12)


def test_a_row_holds_one_sequence_and_padding():
    """Padding on either side is said by `starts_BT`; other documents and tokens beyond the plan are refused. Kills: the
    last document for a plan's sequence; a pass that takes what was not planned for padding."""
    model = small_model("rcmha").double()
    tokens = torch.randint(4, 400, (2, 9), generator=torch.Generator().manual_seed(0))
    items = Edits(Add(Where(keys=1), 2.0), Scale(Where(layers=1, queries=-1, keys=0), 3.0), Map(dtype="fp64"))
    plan = model.plan_edits(items, TokenLayout(6))
    expected = EditRun(plan)
    logits = model(tokens[:1, :6], edits=[expected])
    for side, real in (("left", slice(3, 9)), ("right", slice(0, 6))):
        run, row = EditRun(plan), torch.zeros(1, 9, dtype=torch.long)
        row[:, real] = tokens[:1, :6]
        found = model(row, padding_starts(torch.tensor([6]), 9, side), edits=[run])
        torch.testing.assert_close(found[:, real], logits, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(run.reading[1].map, expected.reading[1].map, rtol=0, atol=1e-12)
    packed = document_starts(torch.tensor([0, 5, 18]), 2, 9)
    for starts, words in (
        (packed, r"edits\[0\]: the row holds 2 documents, and a plan speaks of one sequence"),
        (
            padding_starts(torch.tensor([1, 6]), 9, "right"),
            r"edits\[0\]: the row holds documents of one token alone, and",
        ),
        (padding_starts(torch.tensor([8, 9]), 9, "right"), r"edits\[0\] were planned for 6 tokens, and the row has 8"),
        (None, r"edits\[0\] were planned for 6 tokens, and the row has 9; plan with more new_tokens, or say by starts"),
    ):
        with pytest.raises(ValueError, match=words):
            model(tokens, starts, edits=[EditRun(plan), EditRun(plan)])
    longer = model.plan_edits(items, TokenLayout(9))
    model(tokens, edits=[EditRun(plan), EditRun(longer)])  # the first row's last tokens are padding
    model(tokens, packed, edits=[None, EditRun(longer)])


def test_a_run_is_one_pass():
    """Kills: reads of two sequences in one map."""
    model = small_model("rcmha")
    tokens = torch.randint(4, 400, (1, 9), generator=torch.Generator().manual_seed(0))
    plan = model.plan_edits(Edits(KeySums()), TokenLayout(9))
    words = r"edits\[0\] have seen position 0 already; a run is one pass over one sequence: make EditRun\(plan\) again"
    run = EditRun(plan)
    model(tokens, edits=[run])
    with pytest.raises(ValueError, match=words):
        model(tokens, edits=[run])
    with pytest.raises(ValueError, match=words):
        model.extend(tokens, model.init_state(1, 9), edits=[run])
    _, layer = built("gqa")
    calls = Edits(Map()).plan([layer_sizes(layer)], TokenLayout(TOKENS, steps=2))
    run, x = EditRun(calls), torch.randn(1, TOKENS, DIM, dtype=torch.float64)
    layer(x, edits=layer_plan([run], 0, 0))
    layer(x, edits=layer_plan([run], 0, 1))
    with pytest.raises(ValueError, match="have seen step 1 already"):
        layer(x, edits=layer_plan([run], 0, 1))
    with pytest.raises(ValueError, match=r"edits\[0\]: step=2, and the plan has 2 calls, from 0 on"):
        layer_plan([run], 0, 2)


def test_a_context_and_its_names():
    """Kills: keys of a context by positions of the text; keys that do not exist, shown by an edit."""
    kind, layer = built("gqa")
    layout = TokenLayout(TOKENS, {"word": (3, 4)}, context=TokenLayout(6, {"left": (0, 3), "dog": (4, 6)}))
    items = [
        Hide(Where(queries=Span(0, 5), keys="dog")),
        PutScores(Where(queries="word", keys="left"), [[2.0, 1.0, 0.0]]),
        Scale(Where(heads=1, keys="dog"), 4.0, renormalise=False),
        Map(dtype="fp64"),
    ]
    x, context = torch.randn(2, TOKENS, DIM).double(), torch.randn(2, 6, DIM).double()
    exists = torch.tensor([[True] * 6, [True, False, True, True, True, False]])
    runs = runs_of(layer, [items, items], layout, context=True)
    mask = Mask.full(keys_BS=exists)
    found = layer(x, context_BSD=context, mask=mask, edits=layer_plan(runs, 0))
    given = exists.clone()
    state, outs = layer.init_context(context, given), []
    given.fill_(False)  # the caller's buffer, filled anew
    again = runs_of(layer, [items, items], layout, context=True)
    for chunk in x.split(4, dim=1):
        y, state = layer.extend(chunk, state, edits=layer_plan(again, 0))
        outs.append(y)
    for row in range(2):
        see = exists[row].tolist()
        y, weights = context_formula(kind, layer, x[row], context[row], items, layout, lambda i, j, see=see: see[j])
        np.testing.assert_allclose(found[row], y, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(torch.cat(outs, 1)[row], y, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(runs[row].reading[0].map, weights, atol=1e-12)
        np.testing.assert_allclose(again[row].reading[0].map, weights, atol=1e-12)


def context_formula(kind, layer, x_TD, context_SD, items, layout, seen):
    """`plain` whose words for keys are those of the context; queries named by numbers."""
    words = TokenLayout(layout.prompt, {**layout.context.spans, "word": layout.spans["word"]})
    return plain(kind, layer, x_TD, items, context_SD.numpy(), seen, words)


def test_what_edits_may_not_do():
    """Rows sum to one, hidden keys have no weight, and nothing of the future has a gradient. Kills: renormalising over
    hidden keys; a put weight that shows a later key."""
    _, layer = built("gqa")
    x = torch.randn(1, TOKENS, DIM, dtype=torch.float64, requires_grad=True)
    items = [
        PutScores(Where(), torch.randn(1, TOKENS, TOKENS).tolist()),
        PutWeights(Where(heads=1), torch.rand(1, TOKENS, TOKENS).tolist(), renormalise=True),
        Move(Where(keys=Span(5, 9)), "image", 0.7),
        Scale(Where(keys="text"), 2.5),
        Map(dtype="fp64"),
        Entropy(Where(keys=Span(2, 7))),
    ]
    runs = runs_of(layer, [items])
    y = layer(x, edits=layer_plan(runs, 0))
    weights = runs[0].reading[0].map
    torch.testing.assert_close(weights.sum(-1), torch.ones(HEADS, TOKENS, dtype=torch.float64), rtol=0, atol=1e-6)
    some = weights[..., 2:7] / weights[..., 2:7].sum(-1, keepdim=True).clamp(min=1e-30)
    expected = -torch.xlogy(some, some).sum(-1)
    torch.testing.assert_close(runs[0].reading[0].entropy, expected, rtol=1e-5, atol=1e-6)
    assert (weights.triu(1) == 0).all()
    (gradient,) = torch.autograd.grad(y[0, 4].sum() + weights[:, 4].square().sum(), x)
    assert (gradient[0, 5:] == 0).all()
    assert (gradient[0, :5] != 0).all()


def test_identity_edits_and_untouched_rows_are_off_bit_for_bit():
    _, layer = built("gqa")
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    idle = [Add(Where(), 0.0), Scale(Where(), 1.0), Move(Where(keys="text"), "image", 0.0)]
    missing = [Move(Where(keys=Sinks((1,), 1e9)), "image", 0.9)]  # no token is such a sink: nothing moves
    runs = runs_of(layer, [idle, None])
    assert layer_plan(runs, 0) is None
    assert layer_plan([None, None], 0) is None
    runs = runs_of(layer, [[*READS], [*READS, Add(Where(heads=2, queries=5), 1.0)]])
    found = layer(x, edits=layer_plan(runs, 0))
    assert torch.equal(found[0], layer(x)[0])
    same = torch.arange(TOKENS) != 5
    assert torch.equal(found[1, same], layer(x)[1, same])
    runs = runs_of(layer, [missing, missing])
    torch.testing.assert_close(layer(x, edits=layer_plan(runs, 0)), layer(x), rtol=0, atol=1e-14)


def test_refusals_of_a_call():
    _, layer = built("gqa")
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    runs = runs_of(layer, [READS])
    with pytest.raises(ValueError, match="edits have 1 entries, and the batch has 2 rows"):
        layer(x, edits=layer_plan(runs, 0))
    runs = runs_of(layer, [READS, None], total=TOKENS - 1)
    with pytest.raises(ValueError, match=r"edits\[0\] were planned for 10 tokens, and here is one at position 10"):
        streamed(layer, x, runs, [4])
    runs = runs_of(layer, [READS, None])
    _, state = layer.extend(x[:, :3], layer.init_state(2, 8))
    with pytest.raises(ValueError, match="has seen the hidden states of 0 tokens, and the next one is at position 3"):
        layer.extend(x[:, 3:], state, edits=layer_plan(runs, 0))


@pytest.mark.parametrize(
    "options", [{}, {"normalise": False, "feature_map": "identity", "num_kv_heads": 2}, {"decay": False}]
)
def test_linear_attention_by_its_implied_weights(options):
    """Kills: decay of the kv head, not the query head; a normaliser taken after the edit; edits in extend ignored."""
    torch.manual_seed(1)
    layer = build_attention("linear", {"model_dim": DIM, "num_heads": HEADS, "head_dim": 6} | options).double()
    layer.requires_grad_(False)
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    items = [
        Scale(Where(heads=[1, 3], keys="image"), 2.0),
        Move(Where(queries=Span(4, 9), keys="text"), "image", 0.4),
        Map(dtype="fp64"),
        TopKeys(k=2),
    ]
    runs = [EditRun(Edits(*items).plan([layer_sizes(layer)], LAYOUT, 4, streams=False)), None]
    found = layer(x, edits=layer_plan(runs, 0))
    assert torch.equal(found[1], layer(x)[1])
    q, k, v = (each[0].transpose(0, 1) for each in layer.projection(x))
    phi = {"elu1": lambda y: torch.where(y > 0, y + 1, y.exp()), "identity": lambda y: y}[layer.config.feature_map]
    group = HEADS // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    weights = (phi(q) @ phi(k).mT).tril()
    if layer.config.decay:
        distance = (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).clamp(min=0)
        decay = layer.mixing.decay_logit.sigmoid().repeat_interleave(group)
        weights = weights * decay[:, None, None] ** distance
    if layer.config.normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    np.testing.assert_allclose(layer(x)[0], layer.projection.merge((weights @ v)[None])[0], rtol=1e-9, atol=1e-9)
    oracle = Oracle(items, LAYOUT, TOKENS)
    visible = torch.ones(TOKENS, TOKENS).tril().bool().expand(HEADS, -1, -1).numpy()
    edited, at = weights.numpy().copy(), list(range(TOKENS))
    for item in items[:2]:
        oracle.edit_weights(item, edited, visible, at, [at] * HEADS)
    expected = layer.projection.merge((torch.from_numpy(edited) @ v)[None])[0]
    np.testing.assert_allclose(found[0], expected, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(runs[0].reading[0].map, edited, rtol=1e-8, atol=1e-9)
    assert runs[0].reading[0].top["positions"][0, 0].tolist() == [0, -1]
    with pytest.raises(ValueError, match="edits of Linear work in forward alone: it has no softmax"):
        layer.extend(x, layer.init_state(2, 0), edits=layer_plan(runs, 0))


@pytest.mark.parametrize(
    ("kind", "item", "message"),
    [
        ("linear", Add(Where(), 1.0), r"\(Linear\) cannot have its scores edited: it has no softmax"),
        ("linear", Map(), r"\(Linear\) cannot be read in extend"),
        ("linear", Entropy(), "cannot have an entropy: its weights are no distribution"),
        ("mesa", Mass(), r"\(Mesa\) cannot be read: its outputs solve a regression"),
    ],
)
def test_variants_that_cannot_say_why(kind, item, message):
    layer = build_attention(kind, {"model_dim": DIM, "num_heads": 2})
    with pytest.raises(ValueError, match=message):
        Edits(item).plan([layer_sizes(layer)], LAYOUT, 4)


def test_softmax_regression_reads_its_context():
    layer = build_attention("softmax_regression", {"model_dim": DIM, "num_heads": 2, "num_queries": 3}).double()
    x = torch.randn(1, TOKENS, DIM, dtype=torch.float64)
    runs = [EditRun(Edits(Hide(Where(keys=1)), Map(dtype="fp64")).plan([layer_sizes(layer)], LAYOUT, 4, streams=False))]
    found = layer(x, edits=layer_plan(runs, 0))
    q, k, v = (each[0].transpose(0, 1) for each in layer.projection(x, x[:, :-3]))
    scores = q @ k.mT
    scores[..., 1] = float("-inf")
    expected = layer.projection.merge((scores.softmax(-1) @ v)[None])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(runs[0].reading[0].map[..., : TOKENS - 3], scores.softmax(-1))


def test_top_keys_name_no_hidden_key_and_runs_are_checked():
    """Kills: keys that `Hide` has hidden, in the list of the largest."""
    model = small_model("mha")
    tokens = torch.randint(4, 400, (1, 5), generator=torch.Generator().manual_seed(0))
    plan = model.plan_edits(Edits(Hide(Where(keys=0)), TopKeys(k=3)), TokenLayout(5))
    run = EditRun(plan)
    model(tokens, edits=[run])
    positions = run.reading[0].top["positions"]
    assert (positions[:, 0] == -1).all()
    assert (positions[:, 4] > 0).all()
    with pytest.raises(ValueError, match=r"edits\[0\] is a EditPlan; give EditRun\(plan\) for a row, or None"):
        model(tokens, edits=[plan])
    with pytest.raises(ValueError, match="edits is a EditRun; give a list with"):
        model(tokens, edits=run)
