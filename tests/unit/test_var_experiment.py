"""Experiment V at the smallest sizes: with a model that has sinks, and with one that has none."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from attnzoo.attention.edits import Edits
from attnzoo.models.embedded import prompt_tensor
from tests.helpers.emoji_fonts import needs
from tests.helpers.picture_task import OWN, prepared
from train.experiments.base import ExperimentConfig
from train.experiments.var import ASKED, MORE_QUESTIONS, model_of, parts, picture_sinks, places_of, questions, sinks_of
from train.experiments.var_arms import (
    ARMS,
    FIXED,
    OTHERS_HIDDEN,
    UNEDITED,
    fixed,
    others_hidden,
)
from train.experiments.var_figure import draw
from train.experiments.var_judge import REACHED, SINKS, judge, mcnemar

pytestmark = needs("openmoji")

CHANNEL = 5


@pytest.fixture(scope="module", params=["no sinks", "sinks", "sinks in the picture, too"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ExperimentConfig, str]:
    """A run's directory with an export, and whether its first token and some of its pictures are massive."""
    folder = tmp_path_factory.mktemp("run")
    task = prepared(folder / "cache", *OWN)
    torch.manual_seed(0)
    model = task.model().eval()
    if request.param != "no sinks":
        (begin,) = task.tokenizer.encode("", bos=True)
        model.decoder.embedding.weight.data[begin, CHANNEL] = 3000.0
    if "picture" in request.param:
        model.pictures.output.weight.data[CHANNEL] *= 10
    task.save(folder / "export", model, {})
    return ExperimentConfig(quick=True, trained=folder), request.param


def test_every_part_row_claim_and_figure(run: tuple[ExperimentConfig, str], tmp_path: Path) -> None:
    config, has_sinks, in_picture = run[0], run[1] != "no sinks", "picture" in run[1]
    found, values = parts(config), {}
    others = [OTHERS_HIDDEN] if in_picture else []
    assert set(found) == {SINKS, FIXED, *(ARMS if has_sinks else [UNEDITED]), *others}
    for name, part in found.items():
        ticks: list[int] = []
        values[name] = part.run(config, lambda ticks=ticks: ticks.append(1))
        assert len(ticks) == part.steps, name
    asked = questions(config)
    assert [question.kind for _, question in asked] == [kind for kind in ASKED for _ in range(2)]
    assert all(len(part["right"]) == len(asked) for name, part in values.items() if name != SINKS)
    layers = values[SINKS]["layers"]
    if has_sinks:
        assert (values[SINKS]["channels"], layers[0]["reason"]) == ([CHANNEL], "")
        assert layers[0]["raw"] == pytest.approx(3000.0)
    assert (layers[0]["sinks"] > 0) == in_picture
    assert layers[0]["picture"] == 0.0
    judged = judge(config, values)
    tables = [row["table"] for row in judged.rows]
    assert tables.count("V: sinks by layer") == len(layers) == 2
    assert tables.count("V: paired differences") == len(found) - 2
    accuracy = {row["arm"]: row for row in judged.rows if row["table"] == "V: accuracy by kind of question"}
    assert accuracy[UNEDITED]["all"] == np.mean(values[UNEDITED]["right"])
    counts = [x for x, (_, q) in zip(values[SINKS]["blind"], asked, strict=True) if q.kind == "count"]
    assert accuracy["blind"]["count"] == np.mean(counts)
    claims = {claim.name: claim for claim in judged.claims}
    assert len(claims) == len(REACHED) + 1 + has_sinks
    assert claims["V2 layers with sinks"].measured == has_sinks + (has_sinks and not layers[1]["reason"])
    (figure,) = draw(values, tmp_path)
    assert figure.read_bytes()[:4] == b"\x89PNG"


def test_every_arm_changes_what_the_model_says(run: tuple[ExperimentConfig, str]) -> None:
    config, kind = run
    trained, found = model_of(config), sinks_of(config)
    tau = fixed(found, 1024).layers[0].tau
    assert tau == 10.0
    if kind != "sinks":  # where the picture's tokens are sinks, heads look too little at the others
        return
    _, question = questions(config)[0]
    prompt = trained.prompt(np.zeros((32, 32, 3), dtype=np.uint8), question.text)
    model = trained.language_model.model.requires_grad_(False)
    x_1TD = prompt_tensor(model, [prompt])
    plain = model(x_1TD)
    for name, arm in ARMS.items():
        items = arm(found)
        assert [item.where.layers for item in items] == ([] if name == UNEDITED else [(0,)]), name
        run = trained.plan(prompt, Edits(*items), 4)
        assert torch.allclose(model(x_1TD, edits=[run]), plain, atol=1e-4) == (name == UNEDITED), name


def test_as_many_others_are_hidden_as_are_sinks(run: tuple[ExperimentConfig, str]) -> None:
    """Kills: a neighbour of the picture; the same ones in all layers and batches; the first token left out."""
    config, kind = run
    trained, counts = model_of(config), picture_sinks(config)
    places = places_of(trained)
    tokens = trained.reader.prompt("how many objects are there?")
    assert [token == trained.model.image_token for token in tokens] == [at in places for at in range(len(tokens))]
    if "picture" in kind:
        assert 0 < counts[0] < len(places)
    elif kind == "sinks":
        assert counts == {0: 0}
    drawn = [others_hidden({0: 5, 1: 6}, places, np.random.default_rng(seed)) for seed in (0, 1)]
    chosen = [item.where.keys for items in drawn for item in items]
    assert [len(set(keys)) for keys in chosen] == [6, 7, 6, 7]
    assert all(keys[0] == 0 and set(keys[1:]) <= set(places) for keys in chosen)
    assert not any(set(one) <= set(other) for one, other in zip(chosen[::2], chosen[1::2], strict=True))
    assert chosen[:2] != chosen[2:]
    assert [item.where.layers for item in drawn[0]] == [(0,), (1,)]


def test_mcnemar_is_the_sign_test_of_answers_that_changed() -> None:
    first, second = np.array([1, 1, 1, 1, 1, 0, 1, 0], dtype=bool), np.array([0, 0, 0, 0, 0, 1, 1, 0], dtype=bool)
    assert mcnemar(first, second) == pytest.approx(2 * (1 + 6) / 2**6)  # five against one
    assert mcnemar(first, first) == 1.0


def test_fewer_questions_are_the_first_of_each_kind(run: tuple[ExperimentConfig, str]) -> None:
    """So that what they say is comparable. Kills: a quarter of all kinds together."""
    every = questions(replace(run[0], quick=False))
    some = questions(replace(run[0], quick=False, without=(MORE_QUESTIONS,)))
    assert (len(every), len(some)) == (4000, 1000)
    for kind in ASKED:
        texts = [[question.text for _, question in asked if question.kind == kind] for asked in (every, some)]
        assert texts[1] == texts[0][:125]
