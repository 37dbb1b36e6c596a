"""`python -m scripts.reproduce`: a quick run from end to end, its refusals, and how claims reach report and exit
status."""

import argparse
import json
from functools import partial
from pathlib import Path

import pytest
import torch

import scripts.reproduce
from attnzoo.attention import ATTENTION
from attnzoo.incontext.descent import best_descents
from attnzoo.models import DiffusionConfig, DiffusionUNet
from attnzoo.report import Report
from attnzoo.vision import STYLES, CaptionWords
from attnzoo.vision.trained_diffusion import TrainedDiffusion, save_diffusion
from attnzoo.workers import JobError
from scripts.arguments import EXPERIMENTS
from scripts.reproduce import configure, main
from tests.helpers.emoji_fonts import needs
from train.data.captioned import SCENES
from train.experiments.base import Experiment, ExperimentConfig, ExperimentPart, Judgement
from train.experiments.pool import known_experiments, measure

ROOT = Path(__file__).resolve().parents[2]


class Tiny(ExperimentConfig):
    """Two steps and 64 tasks: everything runs, nothing is learned."""

    def steps(self, full: int) -> int:
        return 2

    def tasks(self, full: int) -> int:
        return 64


def test_a_quick_run_writes_report_and_figures(tmp_path, capsys):
    path = tmp_path / "one-step-gd.json"
    status = main(["one-step-gd", "--quick", "--workers", "1", "--results", str(tmp_path)])
    printed = capsys.readouterr().out
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["quick"] is True
    assert "quick: sizes cut down, not a measurement" in printed
    # 80 steps learn little: that is measured, and told by the exit status.
    assert status == (0 if all(claim["holds"] for claim in report["claims"]) else 1)
    assert len(report["claims"]) == 17
    for claim in report["claims"]:
        assert claim["name"].startswith("B")
        assert claim["name"] in printed
    assert report["figures"] == ["one_step_gd.png"]
    assert (tmp_path / "one_step_gd.png").read_bytes().startswith(b"\x89PNG")


@needs("openmoji")
def test_composition_with_a_trained_model(tmp_path, capsys):
    """A quick run with a model that has learned nothing, which keeps its results beside the export, and goes on with
    them."""
    torch.manual_seed(0)
    words = CaptionWords()
    sizes = {"vocab_size": len(words), "widths": (8,), "patch": 4, "num_heads": 2, "text_dim": 8, "text_layers": 1}
    data = {**SCENES, "kinds": 4, "source": "scenes", "styles": list(STYLES)}
    run, results, second = tmp_path / "run", tmp_path / "results", tmp_path / "second.json"
    trained = TrainedDiffusion(DiffusionUNet(DiffusionConfig(**sizes)).eval(), words, data)
    save_diffusion(run / "export", trained)
    command = ["prime-composer", "--quick", "--workers", "1", "--run", str(run)]
    assert main([*command, "--results", str(results)]) == 1  # it has learned nothing
    kept = {path: path.stat().st_mtime_ns for path in (run / "prime-composer").iterdir()}
    assert len(kept) == 2 + 1 + 4  # readers, drawn prompts, and a case of each style
    report = json.loads((results / "prime-composer.json").read_text(encoding="utf-8"))
    assert {claim["name"].split()[0] for claim in report["claims"]} == {"P1", "P2", "P3", "P4"}
    rows = {(row["table"], row.get("arm")): row for row in report["rows"]}
    assert rows["P: arms", "right answer"]["object distance"] == "0.000 (0.000 to 0.000)"
    assert rows["P: arms", "PrimeComposer"]["forwards"] > rows["P: arms", "without infusion"]["forwards"]
    for figure in ("prime_composer_axes.png", "prime_composer_examples.png"):
        assert figure in report["figures"]
        assert (results / figure).read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert main([*command, "--json", str(second)]) == 1
    assert {path: path.stat().st_mtime_ns for path in (run / "prime-composer").iterdir()} == kept
    assert json.loads(second.read_text(encoding="utf-8"))["claims"] == report["claims"]
    assert main(["prime-composer", "--run", str(tmp_path / "results")]) == 2
    assert "config.json" in capsys.readouterr().err


def test_parts_do_not_depend_on_what_else_runs():
    """Seeds come from keys: one part alone gives what it gives beside others, in this process or another."""
    experiment = known_experiments()["softmax-regression"]
    config = ExperimentConfig(seed=3, quick=True)
    wanted = {name: part for name, part in experiment.parts(config).items() if name in ("derivatives", "closeness")}
    fewer = Experiment("softmax-regression", "C", "", lambda c: wanted, experiment.judge, experiment.draw)
    alone, _ = measure([fewer], config, 1)
    backwards = Experiment(
        "softmax-regression", "C", "", lambda c: dict(reversed(wanted.items())), experiment.judge, experiment.draw
    )
    beside, _ = measure([backwards], config, 2)
    assert alone == beside


def test_experiment_a_of_another_variant(capsys, monkeypatch):
    """Black-box claims alone; a plain linear layer of the zoo goes through all of them."""
    monkeypatch.setattr(ExperimentConfig, "steps", Tiny.steps)
    monkeypatch.setattr(ExperimentConfig, "tasks", Tiny.tasks)
    options = ["num_heads=1", "normalise=false", "decay=false", "feature_map=identity"]
    status = main(["icl-gd", "--variant", "linear", *options, "--quick", "--workers", "1"])
    printed = capsys.readouterr().out
    assert status in (0, 1)
    for claim in ("A1 loss of one trained layer", "A3 x range", "A4 worst loss", "A5 two recurrent layers"):
        assert claim in printed
    assert "A2" not in printed
    assert "A6" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["icl-gd", "--variant", "rchma"], "did you mean 'rcmha'"),
        (["icl-gd", "--variant", "mha", "num_hads=2"], "did you mean 'num_heads'"),
        (["icl-gd", "num_heads=2"], "name it with --variant"),
        (["icl-gd", "--variant", "mha", "model_dim=8"], "the experiment sets model_dim"),
        (["one-step-gd", "--variant", "mha"], "--variant=mha is for icl-gd and depth, not one-step-gd"),
        (["depth", "--variant", "in_context_linear"], "'in_context_linear' is not causal"),
        (["all", "--workers", "0"], "--workers=0 must be at least 1"),
        (["depth", "--data", "x.tar.gz"], "--data=x.tar.gz is of no use to depth; leave it out"),
        (["depth", "--run", "runs/x"], "--run=runs/x is of no use to depth; leave it out"),
        (["prime-composer"], "prime-composer needs --run PATH: a run of deepspeed train/main.py"),
        (["prime-composer", "--run", "no/run"], "--run=no/run does not exist; prime-composer needs"),
        (["depth", "--without", "ensemble"], "--without=ensemble is no part of depth, which has no parts that may be"),
    ],
)
def test_wrong_usage_goes_to_stderr_with_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_an_unknown_experiment_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["icl"])
    assert caught.value.code == 2
    assert "softmax-regression" in capsys.readouterr().err


def test_a_claim_that_does_not_hold_is_exit_status_1(monkeypatch, capsys):
    def judge(config, values):
        out = Judgement()
        out.add("Z the answer", 42.0, values["part"]["answer"], 0.5)
        return out

    def experiment(answer: float) -> Experiment:
        part = ExperimentPart(lambda config, tick: {"answer": answer}, 1)
        return Experiment("icl-gd", "Z", "", lambda config: {"part": part}, judge, lambda values, directory: [])

    for answer, status, shown in ((42.4, 0, "yes"), (43.0, 1, "NO")):
        known = {"icl-gd": experiment(answer)}
        monkeypatch.setattr(scripts.reproduce, "known_experiments", lambda known=known: known)
        monkeypatch.setattr("train.experiments.pool.known_experiments", lambda known=known: known)
        assert main(["icl-gd", "--workers", "1"]) == status
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Z the answer"))
        assert line.split()[-2:] == ["0.5", shown]


def test_a_part_that_fails_is_named(monkeypatch, capsys):
    def broken(config, tick):
        raise RuntimeError("the loss is nan at step 3")

    experiment = Experiment(
        "icl-gd", "Z", "", lambda c: {"odd part": ExperimentPart(broken, 1)}, lambda c, v: Judgement(), None
    )
    monkeypatch.setattr(scripts.reproduce, "known_experiments", lambda: {"icl-gd": experiment})
    monkeypatch.setattr("train.experiments.pool.known_experiments", lambda: {"icl-gd": experiment})
    with pytest.raises(JobError, match="icl-gd, odd part failed: RuntimeError: the loss is nan"):
        measure([experiment], ExperimentConfig(), 1)
    assert main(["icl-gd", "--workers", "1"]) == 1
    assert "odd part" in capsys.readouterr().err


def test_an_experiment_of_a_data_set_says_where_it_is_found(monkeypatch, capsys, tmp_path):
    needing = Experiment("depth", "Z", "", lambda c: {}, None, None, data="sums.csv of the town", optional=("long",))
    monkeypatch.setattr(scripts.reproduce, "known_experiments", lambda: {"depth": needing})
    for words, message in (
        (["depth"], "depth needs --data PATH: sums.csv of the town"),
        (["depth", "--data", "gone.csv"], "--data=gone.csv does not exist; depth needs sums.csv of the town"),
        (["depth", "--data", str(tmp_path), "--without", "short"], "--without=short is no part of depth; it has long"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err
    chosen = argparse.Namespace(
        experiment="all", options=[], workers=1, variant=None, results=None, run=None, seed=0, quick=True
    )
    experiments, config = configure(argparse.Namespace(**vars(chosen), data=None, without=[]))
    assert (experiments, config.data) == ([], None)  # `all` is what needs no data
    experiments, config = configure(
        argparse.Namespace(**{**vars(chosen), "experiment": "depth"}, data=tmp_path, without=["long"])
    )
    assert (experiments, config.data, config.without) == ([needing], tmp_path, ("long",))


def test_every_experiment_claims_under_its_own_letter():
    letters = [experiment.letter for experiment in known_experiments().values()]
    assert len(set(letters)) == len(letters)
    assert tuple(known_experiments()) == EXPERIMENTS  # what the command takes, without importing them
    assert "mesa" in ATTENTION
    assert Report.start(quick=True).exit_status() == 0


@pytest.mark.parametrize("name", ["icl-gd", "one-step-gd", "softmax-regression", "depth"])
def test_every_part_judgement_and_figure(name, tmp_path, monkeypatch):
    """Every numbered claim of the texts is there, every part is judged, every figure that the page shows is drawn."""
    monkeypatch.setattr("train.experiments.one_step_gd.BATCH", 64)
    monkeypatch.setattr("train.experiments.depth.best_descents", partial(best_descents, iterations=2))
    experiment, config = known_experiments()[name], Tiny(quick=True)
    found, seconds = measure([experiment], config, 1)
    values = {part: value for (_, part), value in found.items()}
    json.dumps(values)
    assert set(values) == set(experiment.parts(config)) == {part for _, part in seconds}
    judged = experiment.judge(config, values)
    numbers = {
        "icl-gd": range(1, 9),
        "one-step-gd": range(1, 6),
        "softmax-regression": range(1, 6),
        "depth": range(1, 4),
    }
    assert {claim.name.split()[0] for claim in judged.claims} == {f"{experiment.letter}{n}" for n in numbers[name]}
    assert all(row["table"].startswith(f"{experiment.letter}: ") for row in judged.rows)
    page = (ROOT / "docs" / "experiments" / "in-context-learning.md").read_text(encoding="utf-8")
    for table in {row["table"] for row in judged.rows}:
        assert f"<!-- rows {name}.json {table} -->" in page
    drawn = experiment.draw(values, tmp_path)
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert f"(../results/{path.name})" in page
