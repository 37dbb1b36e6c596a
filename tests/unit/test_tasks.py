"""What a run trains is a task: chosen and checked by name, and what is selected of its evaluations."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from train.best_weights import BestWeights
from train.checkpoint import TrainingProgress
from train.config_reader import load_config
from train.loop import _missed


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.kind=langauge"], "command line: unknown task.kind 'langauge'; did you mean 'language'.*known: "),
        (["task.kind=[language]"], r"command line: unknown task.kind \['language'\]"),
        (["task.knid=language"], "command line: unknown key task.knid; did you mean 'kind'"),
        (["task=language"], "command line: task='language' must be a section"),
        (["eval.keep_best=2"], "command line: eval.keep_best=2 compares evaluations on the same rows; set eval.max_bl"),
        (["eval.keep_best=0", "eval.max_blocks=null"], "command line: eval.keep_best=0 must be at least 1"),
    ],
)
def test_wrong_tasks_are_refused_by_name(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config("base.yaml", overrides)


TEXT = "train: {steps: 1}\nmodel: {model_dim: 8, num_layers: 1, attention: mha}\n"


def test_without_a_task_it_is_a_language_model(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(TEXT, encoding="utf-8")
    assert load_config(str(tmp_path / "old.yaml")).task == {}


@pytest.mark.parametrize(
    ("step", "evaluated", "missed"),
    [(0, -1, True), (6, 6, False), (6, 4, True), (5, 4, False), (8, 6, False)],
    ids=["first", "done", "lost", "not due", "the last, which is always measured"],
)
def test_an_evaluation_that_a_signal_prevented_is_made_up(step: int, evaluated: int, missed: bool) -> None:
    config = load_config("base.yaml", ["train.steps=8", "eval.every=2"])
    run = SimpleNamespace(config=config, progress=TrainingProgress(step=step, total_steps=8, evaluated=evaluated))
    assert _missed(run) == missed  # type: ignore[arg-type]


class Weights:
    """What `BestWeights` asks of an engine: the weights of this moment."""

    def __init__(self, value: float) -> None:
        self.value = value

    def full_state(self) -> dict[str, Tensor]:
        return {"w": torch.full((3,), float(self.value)), "calls": torch.tensor(int(self.value))}


def test_the_best_evaluations_are_kept_and_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    chosen = BestWeights(3)
    scores = {10: 0.5, 20: 0.9, 30: float("nan"), 40: 0.7, 50: 0.9, 60: 0.1}
    for step, score in scores.items():
        chosen.offer(Weights(step), step, score)  # type: ignore[arg-type]
        if step == 40:
            chosen.save(tmp_path)
            before = [list(each) for each in chosen.scores]
    assert chosen.scores == [[20, 0.9], [50, 0.9], [40, 0.7]]
    assert chosen.mean()["w"].tolist() == pytest.approx([110 / 3] * 3)
    assert chosen.mean()["calls"].item() == 20  # counts have no mean
    again = BestWeights(3)
    again.load(tmp_path, before, is_main=True)
    for step in (50, 60):
        again.offer(Weights(step), step, scores[step])  # type: ignore[arg-type]
    assert again.scores == chosen.scores
    assert torch.equal(again.mean()["w"], chosen.mean()["w"])
    again.offer(Weights(1), 50, 0.2)  # type: ignore[arg-type]
    assert again.scores == [[20, 0.9], [40, 0.7], [50, 0.2]]  # a step that is taken again counts once
