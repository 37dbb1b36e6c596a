"""Edits over caches that evict, merge and thin, and through a whole model: what a cache holds, by logical positions."""

import random

import numpy as np
import pytest
import torch

from attnzoo.attention.edits import (
    Add,
    EditRun,
    Edits,
    Hide,
    KeySums,
    Map,
    Mass,
    Move,
    Scale,
    Sinks,
    Span,
    TokenLayout,
    TopKeys,
    Where,
    engine,
)
from attnzoo.attention.edits.spans import Chosen
from attnzoo.attention.edits.streamed import StreamedEdits
from tests.contract.caches import POLICIES, frozen_model, policy_of
from tests.helpers.edits_cases import HEADS, LAYOUT, SINKS, TOKENS, drawn_items
from tests.helpers.edits_oracle import Oracle
from tests.helpers.serving import small_model

SPREAD = TokenLayout(12, {"image": (2, 7), "text": [(7, 9), (0, 1)]})
ITEMS = [
    Add(Where(heads=[0, 3], keys="image"), 1.5),
    Move(Where(heads="1:", queries=Span(5, 16), keys="text"), "image", 0.5),
    Scale(Where(layers=0, heads=2, queries="generated", keys=Span.after("image")), 3.0, renormalise=False),
    Hide(Where(layers=1, queries="generated", keys=3)),
]
READS = [Mass(bins={"image": "image"}), Map(Where(layers=1), dtype="fp64")]


def scores_of(mixing, q_NTH, k_NSH, queries, keys_NS):
    """Scores by the formula of the position, single ones."""
    width = q_NTH.shape[2]
    position = mixing.position
    if not position.relative:
        return torch.einsum("nth,nsh->nts", q_NTH, k_NSH).numpy() / width**0.5
    scores = torch.einsum("nth,nsh->nts", q_NTH + position.content_bias[:, None], k_NSH).numpy()
    rows = position.table.shape[1]
    for n, keys in enumerate(keys_NS):
        for t, i in enumerate(queries):
            for s, j in enumerate(keys):
                row = min(max(i - j, 0), rows - 1)
                scores[n, t, s] += float(q_NTH[n, t] @ position.table[n, row] + position.table_bias[n, row])
    return scores / width**0.5


def plain_segments(segments, kv_heads, width):
    """(keys, values, positions, counts) of every kv head, missing channels 0."""
    parts = []
    for each in segments:
        batch, _, slots, _ = each.keys_BKSC.shape
        whole = []
        for x, channels in ((each.keys_BKSC, each.channels_BKC), (each.values_BKSV, each.value_channels_BKV)):
            full = torch.zeros(batch, kv_heads, slots, width, dtype=x.dtype)
            for b in range(batch):
                for k in range(kv_heads):
                    full[b, k][:, slice(None) if channels is None else channels[b, k]] = x[b, k]
            whole.append(full)
        counts = torch.zeros(batch, kv_heads, slots) if each.log_counts_BKS is None else each.log_counts_BKS
        parts.append((*whole, each.positions_BKS.expand(batch, kv_heads, slots), counts.expand(batch, kv_heads, slots)))
    return [torch.cat(x, dim=2) for x in zip(*parts, strict=True)]


@pytest.mark.parametrize("variant", ["gqa", "rcmha"])
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_cache(name, variant, monkeypatch):
    """Every read of every layer, in plain sums over the entries that the cache holds. Kills: slots for positions; kv
    heads for query heads; merge counts and missing channels left out; a row whose tokens have ended, read again."""
    model = frozen_model(variant)
    seen = []
    edited_read = StreamedEdits.__call__

    def spy(self, out, q, positions, segments):
        before = [{k: None if v is None else v.clone() for k, v in vars(each).items()} for each in segments]
        found = edited_read(self, out, q, positions, segments)
        seen.append((self, out, q, positions, [type(e)(**b) for e, b in zip(segments, before, strict=True)], found))
        return found

    monkeypatch.setattr(StreamedEdits, "__call__", spy)
    monkeypatch.setattr(engine, "FEW", 2)
    plan = model.plan_edits(Edits(*ITEMS, *READS), SPREAD, 6)
    runs = [EditRun(plan), None]
    tokens = torch.randint(0, model.config.vocab_size, (2, 18), generator=torch.Generator().manual_seed(2))
    state = model.init_state(2, 18, cache=policy_of(name))
    with torch.no_grad():
        _, state = model.extend(tokens[:, :12], state, edits=runs)
        state = model.compress(state, joinable=True)
        _, state = model.extend(tokens[:, 12:15], state, torch.tensor([2, 3]), edits=runs)
        for t in range(14, 18):
            _, state = model.extend(tokens[:, t : t + 1], state, torch.tensor([1, t % 2]), edits=runs)
    layers = [block.attention.mixing for block in model.layers()]
    by_plan = {id(run): number for number, run in enumerate(runs[0].records)}
    losses = set()
    for edits, out, q, positions, segments, found in seen:
        number = by_plan[id(edits.plan.rows[0].record)]
        # The row's tokens may have ended, others of the batch go on.
        real = positions[0] <= edits.queries.positions_BT[0].max()
        assert torch.equal(found[0, :, ~real], out[0, :, ~real])
        mixing = layers[number]
        kv_heads, group = mixing.heads.num_kv_heads, HEADS // mixing.heads.num_kv_heads
        k, v, places, counts = (
            x.repeat_interleave(group, 1)[0] for x in plain_segments(segments, kv_heads, q.shape[-1])
        )
        queries, keys = positions[0].tolist(), places.tolist()
        scores = scores_of(mixing, q[0], k, queries, keys) + counts[:, None].numpy()
        visible = (places[:, None] >= 0) & (places[:, None] <= positions[0][None, :, None])
        arrays = (scores, visible.expand(scores.shape).numpy(), v.numpy(), queries, keys)
        unedited, _, _ = Oracle([], SPREAD, 18).run(*arrays)
        np.testing.assert_allclose(out[0], unedited, rtol=1e-9, atol=1e-9)
        expected, _, _ = Oracle(ITEMS, SPREAD, 18, layer=number, layers=len(layers)).run(*arrays)
        np.testing.assert_allclose(found[0, :, real], expected[:, real.numpy()], rtol=1e-9, atol=1e-9)
        assert torch.equal(found[1], out[1])
        losses.add(places.shape[1] < 18 or any(each.channels_BKC is not None for each in segments))
    assert len(seen) >= 4 * len(layers)
    assert True in losses
    reading = runs[0].reading[1]
    assert reading.map.shape == (HEADS, 18, 18)
    assert reading.approximate == ("think" in name or name == "random_channels")
    stands = reading.stands_for_NS
    assert (stands is None) == ("d2o" in name and "merge_counts" not in name and "no merge" not in name)
    stands = torch.where(reading.evicted, 0, 1) if stands is None else stands
    assert stands.shape == (HEADS, 18)
    if ("think" in name and "d2o" not in name) or name == "random_channels":
        assert (stands == 1).all()
    else:
        assert reading.evicted.any()
        assert (reading.map[:, -1][reading.evicted] == 0).all()
    assert ("merge_counts" in name) == bool((stands > 1).any())


@pytest.mark.parametrize("kind", ["mha", "rcmha", "window"])
@torch.no_grad()
def test_a_model_reads_and_edits_the_same_in_chunks(kind):
    """Kills: a layer given another layer's edits; reads that depend on chunks; a row of a map at the wrong query."""
    model = small_model(kind).double()
    inputs = [[], []]
    for layer, block in enumerate(model.layers()):
        block.attention_norm.weight.uniform_(0.2, 2.0, generator=torch.Generator().manual_seed(layer))
        block.register_forward_pre_hook(lambda _block, given, layer=layer: inputs[layer].append(given[0][0]))
    hidden_sinks = Sinks((3, 9, 17, 21), 1.8)  # of hidden states before the norm
    items = [
        Move(Where(keys=hidden_sinks), "image", 0.6),
        Add(Where(layers=-1, keys="text"), 0.5),
        *[
            Mass(bins={"sinks": hidden_sinks, "image": "image"}),
            TopKeys(k=3),
            KeySums(Where(layers=0)),
            Map(dtype="fp32"),
        ],
    ]
    tokens = torch.randint(4, 400, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    plan = model.plan_edits(Edits(*items), LAYOUT, TOKENS - LAYOUT.prompt)
    whole, parts = EditRun(plan), EditRun(plan)
    logits = model(tokens, edits=[whole, None])
    for x_TD, record in zip((each[0] for each in inputs), whole.records, strict=True):
        sizes = x_TD[:, [3, 9, 17, 21]].abs().amax(-1) / x_TD.pow(2).mean(-1).sqrt()
        sets = record.sets(x_TD.device)
        found = sets.holds(Chosen((), (hidden_sinks,)), torch.arange(-1, TOKENS + 1))
        assert torch.equal(found, torch.nn.functional.pad(sizes >= 1.8, (1, 1)))
    assert not torch.allclose(logits[0], model(tokens)[0])
    assert torch.equal(logits[1], model(tokens)[1])
    state, outs = model.init_state(2, 0), []
    for chunk in (tokens[:, :3], tokens[:, 3:4], tokens[:, 4:9], tokens[:, 9:10], tokens[:, 10:]):
        out, state = model.extend(chunk, state, edits=[parts, None])
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), logits, rtol=1e-9, atol=1e-9)
    assert list(whole.reading) == list(parts.reading) == [0, 1]
    some = False
    for layer in whole.reading:
        for one, other in zip(whole.reading[layer].results, parts.reading[layer].results, strict=True):
            assert one.queries_Q.tolist() == other.queries_Q.tolist()
            for value in one.values:
                torch.testing.assert_close(one.values[value], other.values[value], rtol=0, atol=1e-6)
        some |= bool((whole.reading[layer].mass["sinks"] > 0).any())
    assert some
    assert whole.reading.nbytes == parts.reading.nbytes == plan.cost.returned_bytes
    with pytest.raises(ValueError, match="nothing was read of layer 5"):
        whole.reading[5]
    with pytest.raises(ValueError, match="no Entropy was asked for"):
        _ = whole.reading[0].entropy


@torch.no_grad()
def test_requests_of_a_batch_are_apart():
    """Eight rows, four with edits; the others are bit for bit as without, also after a refusal inside an edit."""
    model = small_model("rcmha")
    tokens = torch.randint(4, 400, (8, TOKENS), generator=torch.Generator().manual_seed(5))
    draw = random.Random(4)
    plans = [model.plan_edits(Edits(*drawn_items(draw, row % 2 == 0)), LAYOUT, 4) for row in range(4)]
    off, _ = model.extend(tokens, model.init_state(8, TOKENS))
    bad = EditRun(model.plan_edits(Edits(Mass(bins={"s": SINKS})), LAYOUT, 4))
    sets = bad.records[1].sets(tokens.device)
    sets.observe({}, 0, 2)  # as if it had seen two tokens of another pass
    runs = [None, *(EditRun(plan) for plan in plans), None, None, None]
    with pytest.raises(ValueError, match="must see its sequence from the first token on, once"):
        model.extend(tokens, model.init_state(8, TOKENS), edits=[*runs[:7], bad])
    runs = [None, *(EditRun(plan) for plan in plans), None, None, None]
    found, _ = model.extend(tokens, model.init_state(8, TOKENS), edits=runs)
    for row, run in enumerate(runs):
        assert torch.equal(found[row], off[row]) == (run is None)


@torch.no_grad()
def test_off_runs_nothing_of_edits(monkeypatch):
    """Kills: a cost when nothing is asked for."""
    model = small_model("mha")
    tokens = torch.randint(4, 400, (2, 9), generator=torch.Generator().manual_seed(5))
    expected = model(tokens)
    streamed, _ = model.extend(tokens, model.init_state(2, 9))

    def entered(*_args, **_options):
        raise AssertionError("edits were entered")

    for name in ("attnzoo.models.decoder_lm.layer_plans", "attnzoo.attention.parts.mixing.StreamedEdits"):
        monkeypatch.setattr(name, entered)
    assert torch.equal(model(tokens), expected)
    assert torch.equal(model.extend(tokens, model.init_state(2, 9))[0], streamed)
