"""Sinks of a model, found by its hidden states, and visual attention redistribution on them."""

from dataclasses import replace

import pytest
import torch

from attnzoo.attention.edits import EditRun, Edits, Map, TokenLayout, Where
from attnzoo.checkpoint import load_model
from attnzoo.checkpoint.load import load_tokenizer
from attnzoo.models import DecoderConfig, DecoderLM
from attnzoo.vision.redistribution import find_sinks, redistribution
from tests.helpers.gguf_files import smollm2

LAYERS, DIM, CHANNEL = 6, 32, 5
PICTURE = (1, 9)


def decoder(first: float) -> DecoderLM:
    """A random model whose first token (id 0) has `first` in one channel, which no layer takes away."""
    torch.manual_seed(0)
    attention = {"kind": "mha", "num_heads": 4}
    config = DecoderConfig(vocab_size=50, model_dim=DIM, num_layers=LAYERS, attention=attention, max_positions=64)
    model = DecoderLM(config).eval().requires_grad_(False)
    model.embedding.weight[0, CHANNEL] = first
    return model


def texts(count: int = 4) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [[0, *torch.randint(1, 50, (30,), generator=generator).tolist()] for _ in range(count)]


def test_massive_channels_of_the_first_token_are_found_with_a_threshold_in_the_gap():
    found = find_sinks(decoder(3000.0), texts())
    assert found.channels == (CHANNEL,)
    for number, layer in enumerate(found.layers):
        assert (layer.layer, layer.reason) == (number, "")
        assert layer.raw > 1000
        assert layer.first == pytest.approx(DIM**0.5, rel=1e-3)  # nearly all of the norm is in one channel
        assert layer.tau == (layer.first + layer.others) / 2


@pytest.mark.parametrize(
    ("first", "sinks_of_others", "reason"),
    [(0.0, (), "no massive activation"), (3000.0, (7, 9), "no gap")],
)
def test_where_nothing_sets_the_first_token_apart_there_are_no_sinks(first, sinks_of_others, reason):
    model = decoder(first)
    for token in sinks_of_others:  # as frequent words are in the first layers of SmolLM2
        model.embedding.weight[token, CHANNEL] = first
    given = [[*text, *sinks_of_others] for text in texts()]
    found = find_sinks(model, given)
    assert all(layer.tau is None and layer.reason.startswith(reason) for layer in found.layers)
    with pytest.raises(ValueError, match=f"no layer of this model has sinks.*{reason}.*channels"):
        redistribution(found)
    with pytest.raises(ValueError, match="texts: give one text or more, of at least two tokens"):
        find_sinks(model, [[0]])


def published(weights_NTS, sinks_S, image_S, p, rho, least):
    """The published program's logic on whole maps, whose p is the part that sinks keep, and whose rho bounds the part
    of the picture's sinks: both the other way round than in the paper."""
    keep, most = 1 - p, 1 - rho
    weights = weights_NTS.clone()
    for head in range(len(weights)):
        for query in range(PICTURE[1], weights.shape[1]):
            row = weights[head, query]
            on_image, on_sinks = row[image_S].sum(), row[image_S & sinks_S].sum()
            if on_image < least or on_sinks / on_image > most:
                continue
            budget = (1 - keep) * row[sinks_S].sum()
            row[sinks_S] *= keep
            row[image_S & ~sinks_S] += budget * row[image_S & ~sinks_S] / row[image_S & ~sinks_S].sum()
    return weights


@pytest.mark.parametrize(
    ("rho", "changes"), [(0.7, True), (0.97, False)]
)  # some .95 of the picture's weight is on others
def test_each_layer_is_edited_as_published_with_p_and_rho_the_other_way_round(rho, changes):
    model = decoder(3000.0)
    found = find_sinks(model, texts())
    one = replace(found, layers=tuple(replace(x, tau=x.tau if x.layer == 1 else None) for x in found.layers))
    p, least = 0.6, 0.1
    items = redistribution(one, p=p, rho=rho, least=least)
    assert [item.where.layers for item in redistribution(found)] == [(layer,) for layer in range(LAYERS - 1)]
    tokens, layout = [0, *range(1, 25)], TokenLayout(20, {"image": PICTURE})
    tokens[4] = 0  # a sink in the picture

    runs = [
        EditRun(model.plan_edits(Edits(*given, Map(Where(layers=1), dtype="fp32")), layout, 5)) for given in ([], items)
    ]
    for run in runs:
        model(torch.tensor([tokens]), edits=[run])
    before, after = (run.reading[1].map for run in runs)
    assert runs[1].positions(1, items[0].where.keys) == [0, 4]
    assert runs[1].positions(0, items[0].where.keys) == []
    sinks_S = torch.tensor([token == 0 for token in tokens])
    image_S = torch.tensor([PICTURE[0] <= place < PICTURE[1] for place in range(25)])
    expected = published(before, sinks_S, image_S, p, rho, least)
    assert torch.equal(expected, before) != changes
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-5)


@pytest.mark.heavy
def test_sinks_of_smollm2_are_massive_in_one_channel_from_the_middle_on():
    model, tokenizer = load_model(smollm2()).eval().requires_grad_(False), load_tokenizer(smollm2())
    text = (
        "The sun rose over the old town, and the market woke slowly. Farmers brought apples, pears and bread from the "
        "hills. A child counted the coins in her hand and asked how much a loaf would cost."
    )
    found = find_sinks(model, [tokenizer.encode(text[begin:]) for begin in (0, 60, 120)])
    assert found.channels == (507,)
    assert [layer.layer for layer in found.layers if layer.tau is not None] == list(range(12, 29))
    assert {layer.reason.partition(":")[0] for layer in found.layers if layer.tau is None} == {"no massive activation"}
    assert [item.where.layers for item in redistribution(found)] == [(layer,) for layer in range(12, 29)]
