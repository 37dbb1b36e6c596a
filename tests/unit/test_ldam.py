"""Label-dependent attention, and the model of notes and series: formulas by hand, padding, maps, loss, refusals."""

import dataclasses

import numpy as np
import pytest
import torch

from attnzoo.models import Ldam, LdamConfig, LdamInputs
from attnzoo.models.shapes import without_storage
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.label_attention import label_attention
from tests.helpers import ldam_oracle

K, V, C, D, VOCAB, L, T = 3, 5, 2, 6, 23, 7, 11
TEXTS = {"definitions": ((1, 2, 3), (4,), (5, 6)), "variables": ((7, 8), (9,), (10, 11, 12), (13,), (8, 14))}
SMALL = {"vocab_size": VOCAB, "channels": C, "model_dim": D, "num_heads": 1, "mlp_dim": 13, **TEXTS}
OPTIONS = {
    "text encoder of no layer": {"num_layers": 0},
    "one layer": {},
    "no labels, wide window": {"labels": "none", "window": 5, "num_layers": 0},
    "undescribed series, no label loss": {"describe_series": False, "label_loss": 0.0, "window": 1},
    "weights of each label, mean, linear head": {
        "pooling": "each",
        "mean": True,
        "skip": True,
        "exclusive": True,
        "read_definitions": True,
    },
    "the same without labels": {"pooling": "each", "mean": True, "skip": True, "labels": "none", "num_layers": 0},
}
EXIST = torch.tensor(
    [[True, True, True, True, True], [True, False, True, True, False], [False, False, False, False, False]]
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=tolerance)


def operands(width: int = 3) -> list[torch.Tensor]:
    return [random(3, 5, D, seed=1), random(K, D, seed=2), random(K, width, seed=3), random(K, seed=4)]


@pytest.mark.parametrize("width", [1, 3, 5])
def test_label_attention_is_the_formula(width):
    """Both implementations against loops in numpy where all tokens exist, and against one another with gaps."""
    tokens, labels, kernel, bias = operands(width)
    for impl in ("reference", "torch"):
        found = label_attention(tokens, labels, kernel, bias, impl=impl)
        for b in range(3):
            by_hand = ldam_oracle.label_weights(*(x.numpy() for x in (tokens[b], labels, kernel, bias)))
            for actual, expected in zip(found, by_hand, strict=True):
                close(actual[b], expected)
        gaps = label_attention(tokens, labels, kernel, bias, exist_BT=EXIST, impl=impl)
        hidden = tokens.masked_fill(~EXIST[..., None], float("nan"))
        for left, right in zip(gaps, label_attention(hidden, labels, kernel, bias, exist_BT=EXIST), strict=True):
            close(left, right)
            assert not left[~EXIST].any()
        close(gaps.weights_BT.sum(1), [1.0, 1.0, 0.0])
        # A token that is gone counts as a neighbour of zeros, as beyond the ends of the sequence.
        kept = label_attention(tokens * EXIST[..., None], labels, kernel, bias, impl=impl)
        close(gaps.evidence_BTK[EXIST], kept.evidence_BTK[EXIST])


def test_label_attention_has_the_reference_s_gradients():
    given = [x.requires_grad_() for x in operands()]

    def run(*x):
        scores, evidence, weights = label_attention(*x, exist_BT=EXIST)
        return scores, evidence, weights * torch.arange(5.0, dtype=torch.float64)

    def gradients(impl):
        found = label_attention(*given, exist_BT=EXIST, impl=impl)
        return torch.autograd.grad(sum((x * random(*x.shape, seed=9)).sum() for x in found), given)

    for actual, expected in zip(gradients("torch"), gradients("reference"), strict=True):
        close(actual, expected)
    assert torch.autograd.gradcheck(run, given, eps=1e-7, atol=1e-6)
    empty = [given[0][:, :0], *given[1:]]
    for impl in ("reference", "torch"):
        assert [x.shape for x in label_attention(*empty, impl=impl)] == [(3, 0, K), (3, 0, K), (3, 0)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({0: random(5, D)}, "tokens"),
        ({1: random(K, D + 1)}, "tokens"),
        ({1: random(0, D)}, "at least one"),
        ({2: random(K, 2)}, "odd"),
        ({2: random(K + 1, 3)}, "kernel"),
        ({3: random(K + 1)}, "bias"),
        ({"exist_BT": EXIST[:2]}, "exist_BT"),
        ({"exist_BT": EXIST.long()}, "bool"),
        ({"impl": "triton"}, "triton"),
    ],
)
def test_label_attention_refuses_what_does_not_fit(change, words):
    given = operands()
    for place, value in change.items():
        if isinstance(place, int):
            given[place] = value
    named = {name: value for name, value in change.items() if isinstance(name, str)}
    with pytest.raises(ValueError, match=words):
        label_attention(*given, **named)


def model(seed: int = 0, **options) -> Ldam:
    """Every parameter random, float64, as in evaluation."""
    built = Ldam(LdamConfig(**(SMALL | options))).double().eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.6, generator=generator)
    if built.config.skip:
        built.rarity_W.copy_(torch.rand(VOCAB, generator=generator))
    return built


LENGTHS, HOURS = torch.tensor([7, 3, 1, 0, 5, 0]), torch.tensor([11, 4, 0, 6, 1, 0])
WORDS = torch.randint(0, VOCAB, (6, L), generator=torch.Generator().manual_seed(5))
CELLS = random(6, T, V, C, seed=6)
HAS = torch.ones(6, V, dtype=torch.bool)
HAS[1, [0, 3]] = HAS[4, 2] = False
INPUTS = LdamInputs(words_NL=WORDS, lengths_N=LENGTHS, cells_NTVC=CELLS, hours_N=HOURS, variables_NV=HAS)
TARGETS = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1], [0, 0, 1], [0, 1, 0]])


def oracle_of(built: Ldam):
    """(weights, read): a text of the first encoder by hand, of the others by the encoder on that text alone."""
    weights = {name: value.detach().numpy() for name, value in built.state_dict().items()}

    def read(ids):
        if not built.config.num_layers:
            return ldam_oracle.layer_norm(weights, "text.norm", weights["text.embedding.weight"][list(ids)])
        x = built.text.embedding(torch.as_tensor(ids))[None]
        for block in built.text.blocks:
            x = block(x, Mask.full())
        return built.text.norm(x)[0].detach().numpy()

    return weights, read


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_model_is_the_formula(options):
    """Stays with text and series, one of them, or none; with variables missing; and the loss."""
    built = model(**options)
    weights, read = oracle_of(built)
    rows = [
        ldam_oracle.logits(
            built.config,
            weights,
            read,
            WORDS[n, : LENGTHS[n]].tolist(),
            CELLS[n, : HOURS[n]].numpy(),
            HAS[n].nonzero()[:, 0].tolist(),
        )
        for n in range(6)
    ]
    found = built(INPUTS)
    close(found, np.stack(rows))
    assert found.std(0).min() > 0.01, "the stays must differ for the test to say something"
    expected = ldam_oracle.loss(built.config, weights, read, np.stack(rows), TARGETS.numpy())
    if not built.config.exclusive:
        close(built.loss(INPUTS, TARGETS), expected)
    one = torch.eye(3)[[0, 2, 1, 1, 0, 2]]
    close(built.loss(INPUTS, one), ldam_oracle.loss(built.config, weights, read, np.stack(rows), one.numpy()))
    alone = {
        "text": LdamInputs(words_NL=WORDS, lengths_N=LENGTHS),
        "series": LdamInputs(cells_NTVC=CELLS, hours_N=HOURS, variables_NV=HAS),
    }
    close(built(alone["text"])[[2]], found[[2]])
    close(built(alone["series"])[[3]], found[[3]])
    assert not torch.allclose(built(alone["text"])[0], found[0])


EACH = {"pooling": "each", "mean": True, "skip": True}


@pytest.mark.parametrize("options", [{}, EACH], ids=["shared", "each"])
def test_padding_and_the_other_stays_change_nothing(options):
    built = model(**options)
    expected = built(INPUTS)
    real_L = torch.arange(L) < LENGTHS[:, None]
    real_T = torch.arange(T) < HOURS[:, None]
    junk = CELLS.masked_fill(~(real_T[..., None, None] & HAS[:, None, :, None]), float("nan"))
    longer = LdamInputs(
        words_NL=torch.nn.functional.pad(WORDS.masked_fill(~real_L, -7), (0, 4), value=VOCAB + 9),
        lengths_N=LENGTHS,
        cells_NTVC=torch.nn.functional.pad(junk, (0, 0, 0, 0, 0, 3), value=float("inf")),
        hours_N=HOURS,
        variables_NV=HAS,
    )
    close(built(longer), expected)
    for n in range(6):
        cut = LdamInputs(
            words_NL=WORDS[n : n + 1, : LENGTHS[n]],
            lengths_N=LENGTHS[n : n + 1],
            cells_NTVC=CELLS[n : n + 1, : HOURS[n]],
            hours_N=HOURS[n : n + 1],
            variables_NV=HAS[n : n + 1],
        )
        close(built(cut), expected[n : n + 1])
    everything = dataclasses.replace(INPUTS, variables_NV=None)
    close(built(dataclasses.replace(INPUTS, variables_NV=torch.ones_like(HAS))), built(everything))


def test_maps_say_what_the_sums_were_made_of():
    """G, u and beta of words rebuild the logits of a stay of text; the word that is a label's own stands out."""
    built = model(num_layers=0)
    maps = built.read_maps(INPUTS)
    assert maps.words.scores_BTK.shape == (6, L, K)
    v_LD = built.text(WORDS[2:3, :1], torch.ones(1, 1, dtype=torch.bool))[0]
    close(built.head(built.value(maps.words.weights_BT[2, :1] @ v_LD)), built(INPUTS)[2])
    close(maps.variables.weights_BT.sum(1), torch.ones(6))
    assert not maps.variables.weights_BT[~HAS].any()
    close(maps.words_NKL, maps.words.weights_BT[:, None].expand(-1, K, -1))
    each = model(num_layers=0, pooling="each").read_maps(INPUTS)
    close(each.words_NKL.sum(-1)[LENGTHS > 0], torch.ones(4, K))
    assert not each.words_NKL[LENGTHS == 0].any()
    assert built.read_maps(LdamInputs(words_NL=WORDS, lengths_N=LENGTHS)).variables is None
    plain = model(num_layers=0)
    with torch.no_grad():
        plain.words.project.weight.copy_(torch.eye(D))
        plain.words.kernel.copy_(torch.tensor([0.0, 1.0, 0.0]).expand(K, 3))
        plain.words.bias.zero_()
    own = LdamInputs(words_NL=torch.tensor([[15, 16, 4, 17, 18]]), lengths_N=torch.tensor([5]))
    found = plain.read_maps(own).words
    assert found.scores_BTK[0, :, 1].argmax() == 2, "token 4 is the definition of label 1"
    close(found.evidence_BTK, found.scores_BTK.relu())


@pytest.mark.parametrize("options", [{}, {**EACH, "num_layers": 0}], ids=["shared", "each"])
def test_words_that_are_taken_away_are_unknown_ones(options):
    """In part, embeddings lie between; in training the model hides some itself."""
    built = model(**options)
    presence = torch.ones(6, L, dtype=torch.float64)
    close(built(dataclasses.replace(INPUTS, presence_NL=presence)), built(INPUTS))
    presence[0, 2] = presence[4, 0] = 0.0
    hidden = WORDS.clone()
    hidden[0, 2] = hidden[4, 0] = 0
    found = built(dataclasses.replace(INPUTS, presence_NL=presence))
    if options:  # the linear head weighs words as the whole text has them
        plain = model(**{**options, "skip": False})
        plain.load_state_dict({k: v for k, v in built.state_dict().items() if not k.startswith(("skip", "rarity"))})
        assert not torch.allclose(found, plain(dataclasses.replace(INPUTS, presence_NL=presence)))
        built = plain
        found = built(dataclasses.replace(INPUTS, presence_NL=presence))
    close(found, built(dataclasses.replace(INPUTS, words_NL=hidden)))
    assert not torch.allclose(found[0], built(INPUTS)[0])
    table = built.text.embedding.weight
    half = built.text(WORDS[:1, :1], torch.ones(1, 1, dtype=torch.bool), torch.tensor([[0.5]], dtype=torch.float64))
    built.text.embedding.weight.data[WORDS[0, 0]] = (table[0] + table[WORDS[0, 0]]) / 2
    close(half, built.text(WORDS[:1, :1], torch.ones(1, 1, dtype=torch.bool)))
    hiding = model(**options, hide_words=0.5, dropout=0.0)
    close(hiding(INPUTS), hiding(INPUTS))
    hiding.train()
    assert not torch.allclose(hiding(INPUTS), hiding(INPUTS))


def test_training_uses_labels_and_the_ablation_does_not():
    """Some steps lower the loss; every parameter takes part; the label-free model never reads definitions."""
    torch.manual_seed(0)
    for options in ({}, EACH, {"labels": "none"}):
        built = model(**options).train()
        steps = torch.optim.Adam(built.parameters(), lr=0.02)
        before = built.eval().loss(INPUTS, TARGETS).item()
        built.train()
        for _ in range(5):
            steps.zero_grad()
            built.loss(INPUTS, TARGETS).backward()
            steps.step()
        assert built.eval().loss(INPUTS, TARGETS).item() < before - 0.05
        assert [name for name, p in built.named_parameters() if p.grad is None] == []
    other = dataclasses.replace(built.config, definitions=((2,), (3, 3), (20,)))
    swapped = Ldam(other).double().eval()
    swapped.load_state_dict(built.state_dict())
    close(swapped(INPUTS), built(INPUTS))
    labelled = model()
    relabelled = Ldam(dataclasses.replace(labelled.config, definitions=((2,), (3, 3), (20,)))).double().eval()
    relabelled.load_state_dict(labelled.state_dict())
    assert not torch.allclose(relabelled(INPUTS), labelled(INPUTS))


def test_configuration_is_written_and_read_back():
    config = LdamConfig(**SMALL)
    values = config.to_dict() | {"definitions": [list(ids) for ids in config.definitions]}
    assert LdamConfig.from_dict(values) == config
    with without_storage():
        assert Ldam(config).head.weight.is_meta
    assert "series.first.weight_ih_l0" not in Ldam(LdamConfig(**(SMALL | {"variables": ()}))).state_dict()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"definitions": ()}, "definitions"),
        ({"definitions": ((),)}, r"definitions\[0\] is empty"),
        ({"variables": ((1,), (VOCAB,))}, r"variables\[1\] holds token id 23"),
        ({"window": 4}, "odd"),
        ({"model_dim": 7}, "even"),
        ({"dropout": 1.0}, "dropout"),
        ({"hide_words": 1.0}, "hide_words=1.0 must be"),
        ({"label_loss": -1.0}, "label_loss"),
        ({"num_layers": -1}, "num_layers"),
        ({"channels": 0}, "channels"),
        ({"attention": "mhb"}, "model.attention|mhb"),
        ({"attention": "tscan"}, "TSCAN is not causal"),
    ],
)
def test_configurations_that_cannot_be_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Ldam(LdamConfig(**(SMALL | options)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"words_NL": None, "lengths_N": None, "cells_NTVC": None, "hours_N": None, "variables_NV": None}, "neither"),
        ({"lengths_N": None}, "lengths_N and words_NL"),
        ({"cells_NTVC": None}, "hours_N and cells_NTVC"),
        ({"cells_NTVC": None, "hours_N": None}, "variables_NV"),
        ({"words_NL": WORDS[0]}, "words_NL"),
        ({"words_NL": WORDS + 12}, "words_NL holds token id"),
        ({"lengths_N": LENGTHS + 1}, "lengths_N="),
        ({"hours_N": HOURS[:3]}, "hours_N has shape"),
        ({"hours_N": HOURS - 1}, "hours_N="),
        ({"presence_NL": torch.ones(6, 2)}, "presence_NL has shape"),
        ({"words_NL": None, "lengths_N": None, "presence_NL": torch.ones(6, 0)}, "presence_NL is given without"),
        ({"cells_NTVC": CELLS[..., :1]}, "cells_NTVC"),
        ({"variables_NV": HAS[:, :2]}, "variables_NV"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        model(num_layers=0)(dataclasses.replace(INPUTS, **change))


def test_series_without_descriptions_and_targets_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="variables=\\(\\) describes none"):
        model(variables=())(INPUTS)
    with pytest.raises(ValueError, match="targets_NK"):
        model().loss(INPUTS, TARGETS[:, :2])
