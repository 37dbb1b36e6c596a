"""Experiment V at the smallest sizes: with a model that has sinks, and with one that has none."""

from pathlib import Path

import numpy as np
import pytest
import torch

from attnzoo.attention.edits import Edits
from attnzoo.models.embedded import prompt_tensor
from tests.helpers.emoji_fonts import needs
from tests.helpers.picture_task import OWN, prepared
from train.experiments.base import ExperimentConfig
from train.experiments.var import ASKED, model_of, parts, questions, sinks_of
from train.experiments.var_arms import ARMS, FIXED, UNEDITED, fixed
from train.experiments.var_figure import draw
from train.experiments.var_judge import REACHED, SINKS, judge, mcnemar

pytestmark = needs("openmoji")

CHANNEL = 5


@pytest.fixture(scope="module", params=[0.0, 3000.0], ids=["no sinks", "sinks"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ExperimentConfig, bool]:
    """A run's directory with an export, and whether its first token is massive."""
    folder = tmp_path_factory.mktemp("run")
    task = prepared(folder / "cache", *OWN)
    torch.manual_seed(0)
    model = task.model().eval()
    if request.param:
        (begin,) = task.tokenizer.encode("", bos=True)
        model.decoder.embedding.weight.data[begin, CHANNEL] = request.param
    task.save(folder / "export", model, {})
    return ExperimentConfig(quick=True, trained=folder), bool(request.param)


def test_every_part_row_claim_and_figure(run: tuple[ExperimentConfig, bool], tmp_path: Path) -> None:
    config, has_sinks = run
    found, values = parts(config), {}
    assert set(found) == {SINKS, FIXED, *(ARMS if has_sinks else [UNEDITED])}
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


def test_every_arm_changes_what_the_model_says(run: tuple[ExperimentConfig, bool]) -> None:
    config, has_sinks = run
    trained, found = model_of(config), sinks_of(config)
    tau = fixed(found, 1024).layers[0].tau
    assert tau == 10.0
    if not has_sinks:
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


def test_mcnemar_is_the_sign_test_of_answers_that_changed() -> None:
    first, second = np.array([1, 1, 1, 1, 1, 0, 1, 0], dtype=bool), np.array([0, 0, 0, 0, 0, 1, 1, 0], dtype=bool)
    assert mcnemar(first, second) == pytest.approx(2 * (1 + 6) / 2**6)  # five against one
    assert mcnemar(first, first) == 1.0
