"""The clinical task: what it refuses, what it learns from, its losses, and the model that it exports."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from attnzoo.clinical.calibration import Calibrator, fit_calibrator
from attnzoo.clinical.cohort import Cohort
from attnzoo.clinical.metrics import brier
from attnzoo.clinical.outcome import Outcome
from attnzoo.clinical.statistics import Statistics
from attnzoo.clinical.trained import TrainedModel, check_target, load_trained, save_trained
from attnzoo.models import EhrConfig, EhrEncoder
from tests.helpers.clinical_data import small_cohort
from tests.helpers.clinical_files import write_stays
from tests.helpers.cohort_task import prepared_task
from train.config_reader import load_config
from train.main import main
from train.tasks import ClinicalTask

MODEL = [
    "task.validation=0.3",
    "model.model_dim=8",
    "model.num_heads=2",
    "model.mlp_dim=16",
    "model.chunks=2",
    "model.chunk_hours=3",
]


def prepared(cohort: Cohort, *overrides: str) -> ClinicalTask:
    """The task on a cohort that is in memory."""
    return prepared_task(ClinicalTask, "tscan-mortality.yaml", cohort, ["task.split=patient", *MODEL, *overrides])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.kind=clincal"], "command line: unknown task.kind 'clincal'; did you mean 'clinical'"),
        (["task.lable=death"], "command line: unknown key task.lable; did you mean 'label'"),
        (["task.split=patients"], "command line: task.split='patients' is not one of 'patient', 'stay', 'time'"),
        (["task.fold=5"], "command line: task.fold=5 must be from 0 to 4"),
        (["task.validation=0.0"], "command line: task.validation=0.0 must be between 0 and 1"),
        (["task.edges=[24, 12]"], r"command line: edges=\[24.0, 12.0\] must ascend"),
        (["task.split=time", "task.fold=1"], "command line: task.fold=1 is of no use with task.split=time"),
        (["task.split=time", "task.split_seed=1"], "command line: task.split_seed=1 is of no use with task.split=time"),
        (["model.model_dmi=8"], "command line: unknown key model.model_dmi; did you mean 'model_dim'"),
        (["model.variables=37"], "command line: model.variables=37: the cohort and the task determine it"),
        (["model.dropout=1.5"], "command line: dropout=1.5 must be at least 0 and below 1"),
        (["data.format=physionet2021"], "command line: data: unknown data format 'physionet2021'; did you mean 'phys"),
        (["data.huors=24"], "data: unknown option 'huors' of the data format 'physionet2012'; did you mean 'hours'"),
        (["data.path=null"], "command line: data.path=None must be the place of the data set"),
        (["tokenizer.vocab_size=300"], "command line: task.kind=clinical has no use for tokenizer={'vocab_size': 300}"),
        (["precision=bf16"], "command line: precision=bf16: the clinical encoder has float32 weights; use fp32 or"),
        (["sample.every=5"], "command line: task.kind=clinical has no use for sample="),
        (
            ["checkpoint.init_from=x", "task.kind=clinical-pretraining"],
            "command line: task.kind=clinical-pretraining has no use for checkpoint.init_from='x'",
        ),
    ],
)
def test_wrong_options_are_refused_by_name_before_anything_is_read(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config("tscan-mortality.yaml", overrides)


def test_what_does_not_fit_the_cohort_is_refused() -> None:
    cohort = small_cohort()
    for overrides, message in (
        (["task.label=los"], "task.label: cohort 'made up' has no label 'los'; it has mortality"),
        (
            ["task.hourly=true"],
            "task.label: label 'mortality' of cohort 'made up' is one for each stay; set hourly=False",
        ),
        (["task.folds=39"], "task.split=patient: cohort 'made up' has 23 patients, fewer than k=39 folds"),
        (["task.validation=0.05"], "the validation part of .* has no 'mortality' of both kinds to select"),
    ):
        with pytest.raises(ValueError, match=message):
            prepared(cohort, *overrides)
    with pytest.raises(ValueError, match=r"task\.split=patient: cohort 'made up' has no patient identifiers"):
        prepared(replace(cohort, patient_ids=None))
    for value in (0, 1):
        alike = replace(cohort, labels={"mortality": np.full(40, value, np.float32)})
        told = (
            f"task.label: the cohort of 40 stays has no 'mortality' of both kinds: it is {value} wherever it is known"
        )
        with pytest.raises(
            ValueError, match=f"{told}, so that nothing can be learned or calibrated; take another label"
        ):
            prepared(alike)
    nobody = replace(cohort, labels={"mortality": np.full(40, np.nan, np.float32)})
    with pytest.raises(ValueError, match="'mortality' of both kinds: it is not known of any row, so that nothing"):
        prepared(nobody)
    task = prepared(cohort)
    kinds = cohort.label("mortality").copy()
    kinds[task.fold.train] = 1
    with pytest.raises(
        ValueError, match=r"x: the training part of .* has no 'died' of both kinds to learn from; lower"
    ):
        task.check_kinds("x", {"died": kinds})
    long = replace(cohort, labels={"los": np.full(40, 7.0, np.float32)})
    with pytest.raises(
        ValueError, match=r"task\.label: the cohort of 40 stays has no 'los' of both kinds: it is 1 where"
    ):
        prepared(long, "task.label=los", "task.edges=[3,9]")
    days = replace(cohort, labels={"mortality": np.arange(40, dtype=np.float32)})
    with pytest.raises(ValueError, match="has values such as 2, not only 0 and 1; give the edges of its buckets"):
        prepared(days)


def test_missing_files_are_told_by_a_dry_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["data.path=nowhere.tar.gz", f"run_dir={tmp_path / 'run'}"]
    assert main(["--config", "tscan-mortality.yaml", "--dry-run", *options]) == 2
    assert "data.path=nowhere.tar.gz does not exist" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_dry_run_refuses_what_the_run_refuses(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Fewer stays than a global batch takes."""
    words = [f"data.path={write_stays(tmp_path)}", "data.hours=12", "model.chunks=1", f"run_dir={tmp_path / 'run'}"]
    assert main(["--config", "tscan-mortality.yaml", "--dry-run", *words]) == 2
    told = "one global batch takes 64 stays and the training part has 45; lower train.batch_size"
    assert told in capfd.readouterr().err
    assert main(["--config", "tscan-mortality.yaml", "--dry-run", *words, "train.batch_size=32"]) == 0


def test_test_rows_change_nothing_that_is_learned() -> None:
    """Other values, labels and statics of the fold's test rows: the same statistics, batches and validation rows."""
    cohort = small_cohort()
    task = prepared(cohort)
    test = task.fold.test
    values_NTV, labels_N, statics_NS = (
        array.copy() for array in (cohort.grid.values_NTV, cohort.labels["mortality"], cohort.statics_NS)
    )
    values_NTV[test] = 150.0
    statics_NS[test] = 1.0
    grid = replace(cohort.grid, values_NTV=values_NTV)
    other = prepared(replace(cohort, grid=grid, statics_NS=statics_NS, labels={"mortality": labels_N}))
    assert other.statistics == task.statistics
    assert all(torch.equal(*pair) for pair in zip(task.validation(), other.validation(), strict=True))
    for _ in range(5):
        mine, theirs = task.train.next(4, 0, 1), other.train.next(4, 0, 1)
        assert all(torch.equal(*pair) for pair in zip(mine, theirs, strict=True))
    orders = [task.train.epoch(np.random.default_rng(seed)).tolist() for seed in range(2)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == task.fold.train.tolist()
    parts = [set(np.array(cohort.patient_ids)[rows]) for rows in (task.fold.train, task.fold.validation, test)]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert other.content()["data (content)"] != task.content()["data (content)"]  # yet it is not the same cohort


def test_a_loss_is_the_same_however_rows_are_cut() -> None:
    cohort = small_cohort()
    labels = cohort.labels["mortality"].copy()
    labels[::3] = np.nan
    task = prepared(replace(cohort, labels={"mortality": labels}), "model.combine=sum")
    torch.manual_seed(0)
    model, batch = task.model().eval(), task.validation()
    assert not torch.isnan(batch[3]).any()  # stays without a label are no rows
    count = torch.tensor(float(task.count(batch)))
    whole = task.loss(model, batch, count)
    parts = [task.loss(model, tuple(t[i : i + 3] for t in batch), count) for i in range(0, len(batch[0]), 3)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=0)
    logits = task.measure(model, batch)
    torch.testing.assert_close(whole, F.binary_cross_entropy_with_logits(logits[:, 0], batch[3]), rtol=1e-5, atol=0)
    metrics = task.metrics(batch, logits.detach())
    assert metrics["loss"] == pytest.approx(float(whole.detach()), rel=1e-5)
    assert task.score(metrics) == metrics["auroc"] + metrics["auprc"]
    broken = task.metrics(batch, torch.full_like(logits, float("nan")))
    assert all(np.isnan(value) for value in broken.values())


@pytest.mark.parametrize("head", ["ordinal", "linear"])
def test_buckets_of_a_label(head: str) -> None:
    """Losses and probabilities by hand; a label at an edge is in the upper bucket; unknown hours do not count."""
    outcome = Outcome(label="los", edges=(24.0, 48.0), head=head, hourly=True)  # type: ignore[arg-type]
    labels = torch.tensor([[10.0, 24.0, float("nan")], [47.0, 48.0, 500.0]])
    buckets = [0, 1, 1, 2, 2]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, outcome.outputs, generator=generator, dtype=torch.float64)
    rows = logits[~labels.isnan()]
    found = outcome.probabilities(logits.numpy())[~labels.isnan().numpy()]
    if head == "ordinal":
        rows = logits[~labels.isnan()] = torch.sort(rows, descending=True).values
        found = outcome.probabilities(logits.numpy())[~labels.isnan().numpy()]
        above = rows.sigmoid()
        wanted = torch.stack([1 - above[:, 0], above[:, 0] - above[:, 1], above[:, 1]], 1)
        each = [[bucket > edge for edge in range(2)] for bucket in buckets]
        loss = F.binary_cross_entropy(above, torch.tensor(each).double(), reduction="sum") / 2
    else:
        wanted = rows.softmax(-1)
        loss = -sum(wanted[i, bucket].log() for i, bucket in enumerate(buckets))
    torch.testing.assert_close(torch.from_numpy(found), wanted)
    assert float(outcome.loss_sum(logits, labels)) == pytest.approx(float(loss), rel=1e-6)
    medians = [int((wanted[i].cumsum(0) < 0.5).sum()) for i in range(5)]
    assert outcome.buckets(logits.numpy())[~labels.isnan().numpy()].tolist() == medians
    assert outcome.fitted(np.array([1.0, 3.0, 30.0])).centers == (2.0, 30.0, 48.0)
    assert Outcome.from_dict(json.loads(json.dumps(outcome.to_dict()))) == outcome


def test_hourly_buckets_are_trained_and_measured() -> None:
    cohort = small_cohort()
    left = np.maximum(90.0 - 10 * np.arange(6)[None] - np.arange(40)[:, None], 1).astype(np.float32)
    cohort = replace(cohort, labels={"los": left})
    overrides = ["task.label=los", "task.hourly=true", "task.edges=[24, 48]", "model.summary=none"]
    task = prepared(cohort, *overrides)
    torch.manual_seed(0)
    model, batch = task.model(), task.train.next(8, 0, 1)
    assert task.count(batch) == 8 * 6
    task.loss(model, batch, torch.tensor(48.0)).backward()
    # What would tell later hours of an earlier one takes no part.
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == {
        "branches",
        "head",
        "steps",
    }
    metrics = task.metrics(task.validation(), task.measure(model.eval(), task.validation()).detach())
    assert set(metrics) == set(task.METRICS) == {"loss", "kappa", "mad"}
    assert task.score(metrics) == metrics["kappa"]


def test_parts_that_learn_apart_have_the_mean_of_their_losses() -> None:
    task = prepared(small_cohort(), "model.combine=mean", "model.summary=mlp", "model.dropout=0.0")
    torch.manual_seed(0)
    model, batch = task.model().eval(), task.train.next(8, 0, 1)
    with torch.no_grad():
        parts = model(*batch[:3], each_part=True)
        losses = [F.binary_cross_entropy_with_logits(part[:, 0], batch[3]) for part in parts]
        found = task.loss(model, batch, torch.tensor(8.0))
        of_mean = F.binary_cross_entropy_with_logits(task.measure(model, batch)[:, 0], batch[3])
    assert float(found) == pytest.approx(float(sum(losses)) / 3, rel=1e-5)
    assert float(found) != pytest.approx(float(of_mean), rel=1e-5)


def saved_by(task: ClinicalTask, directory: Path) -> TrainedModel:
    """What the export of a model holds whose logits differ much, and are all too high."""
    torch.manual_seed(0)
    model = task.model().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith("head.") and name.endswith("bias"):
                weight.fill_(3.0)
            elif name.startswith("head."):
                weight.mul_(200.0)
    task.save(directory, model, {"validation_loss": 1.0, "brier": 0.5})
    return load_trained(directory)


def test_the_export_is_calibrated_on_the_inner_validation_rows(tmp_path: Path) -> None:
    """And its predictions are the calibrated ones; the metrics as served stand beside the others."""
    cohort = small_cohort(260)
    task = prepared(cohort, "task.validation=0.5", "data.path=nowhere", "task.explained=0")
    told_by = TrainedModel(saved_by(task, tmp_path / "first").model, task.statistics, Outcome())
    order = np.random.default_rng(0).normal(size=260) + 3 * standardised(told_by.logits(cohort)[:, 0])
    labels_N = (order > np.quantile(order, 0.7)).astype(np.float32)
    cohort = replace(cohort, labels={"mortality": labels_N})
    task = prepared(cohort, "task.validation=0.5", "data.path=nowhere", "task.explained=0")
    found, rows = saved_by(task, tmp_path / "export"), task.fold.validation
    assert found.calibrator is not None
    labels, logits = task.cohort.label("mortality")[rows], found.logits(task.cohort, rows)
    again = fit_calibrator(labels, logits[:, 0])
    # Logits of a batch of other rows may differ in their last bit.
    assert found.calibrator.temperature == pytest.approx(again.temperature, rel=1e-9)
    assert found.calibrator.intercept == pytest.approx(again.intercept, rel=1e-9)
    told = found.predict(task.cohort, rows)
    assert told == pytest.approx(found.calibrator.probabilities(logits[:, 0]))
    assert np.array_equal(found.probabilities(logits), told)
    assert told.mean() == pytest.approx(labels.mean(), abs=1e-6)  # what temperature and intercept make sure of
    served = {"validation_loss": pytest.approx(log_loss(labels, told), rel=1e-5), "brier": brier(labels, told)}
    assert {name: found.metadata["as_served"][name] for name in served} == served
    assert found.metadata["brier"] == 0.5  # of the weights as they were selected
    assert task.findings.as_served == found.metadata["as_served"]
    assert task.findings.words[0].startswith("as served, calibrated: validation_loss 0.")
    with pytest.raises(ValueError, match="calibrator: temperature and intercept are those of a yes or no"):
        replace(found, outcome=Outcome(label="los", edges=(24.0,)))


def standardised(x: np.ndarray) -> np.ndarray:
    found: np.ndarray = (x - x.mean()) / x.std()
    return found


def log_loss(labels: np.ndarray, told: np.ndarray) -> float:
    return float(-np.log(np.where(labels == 1, told, 1 - told)).mean())


def test_a_calibration_on_too_few_stays_is_refused_and_said(tmp_path: Path) -> None:
    """In the export and in the run's last lines; the model predicts what it tells."""
    task = prepared(small_cohort(), "task.validation=0.5", "data.path=nowhere", "task.explained=0")
    found = saved_by(task, tmp_path / "export")
    events = int(task.labels[task.fold.validation].sum())
    why = (
        f"the part that calibrates has {len(task.fold.validation) - events} stays without the label and {events} stays "
        "with the label, and a fit needs 20 of each"
    )
    assert found.calibrator is None
    assert found.evidence is not None
    assert (found.evidence.uncalibrated, found.evidence.calibrators) == (why, ())
    assert task.findings.words == (f"warning: the model is not calibrated, and served without an interval: {why}",)
    assert "as_served" not in found.metadata
    logits = found.logits(task.cohort)
    assert found.predict(task.cohort) == pytest.approx(1 / (1 + np.exp(-logits[:, 0].astype(float))))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainedModel]:
    torch.manual_seed(0)
    cohort = small_cohort()
    statistics = Statistics.fit(cohort, np.arange(20))
    statics = len(statistics.static_columns)
    config = EhrConfig(variables=3, statics=statics, model_dim=8, num_heads=2, mlp_dim=16, chunks=2, chunk_hours=3)
    told = ({"hours": 6}, {"fold": 1}, {"steps": 3}, Calibrator(temperature=2.0, intercept=-0.5))
    trained = TrainedModel(EhrEncoder(config).eval(), statistics, Outcome(), *told)
    return save_trained(tmp_path_factory.mktemp("trained") / "export", trained), trained


def test_a_saved_model_predicts_the_same(saved: tuple[Path, TrainedModel]) -> None:
    directory, trained = saved
    again, cohort = load_trained(directory), small_cohort()
    for name in ("outcome", "data", "split", "metadata", "calibrator"):
        assert getattr(again, name) == getattr(trained, name)
    assert again.statistics == trained.statistics
    found = again.predict(cohort)
    assert np.array_equal(found, trained.predict(cohort))
    assert ((found > 0) & (found < 1)).all()
    some = np.array([7, 0, 31])
    assert np.allclose(again.predict(cohort, some, batch_size=2), found[some], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="variables are not those of the statistics"):
        again.predict(small_cohort(variables=("HR", "Glucose", "Na")))
    save_trained(directory, trained)  # replaces an earlier one
    (directory / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds 'notes\.txt' beside the model"):
        check_target(directory)
    (directory / "notes.txt").unlink()


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "config.json",
            lambda text: text.replace("attnzoo-ehr-1", "attnzoo-decoder-1"),
            "config.json: format 'attnzoo-de",
        ),
        ("config.json", lambda text: text.replace('"split"', '"spilt"'), "unknown key spilt; did you mean 'split'"),
        (
            "config.json",
            lambda text: text.replace('"temperature": 2.0', '"temperature": -2.0'),
            "is damaged .*=-2.0 must",
        ),
        ("config.json", lambda text: text.replace('"model_dim": 8', '"model_dim": 12'), "is damaged .*size mismatch"),
        ("statistics.json", lambda text: text.replace('"means"', '"maens"'), "is damaged .*statistics: field 'means'"),
        ("statistics.json", None, r"holds no trained model of format .* \(.*statistics.json"),
        ("model.safetensors", None, "is damaged "),
    ],
)
def test_damaged_models_are_refused_by_file(saved, tmp_path: Path, file: str, change, message: str) -> None:
    copy = save_trained(tmp_path / "copy", saved[1])
    if change is None:
        (copy / file).unlink()
    else:
        (copy / file).write_text(change((copy / file).read_text()))
    with pytest.raises(ValueError, match=message):
        load_trained(copy)


def test_a_run_begins_with_an_encoder_that_saw_no_other_stays(tmp_path: Path) -> None:
    """Pretraining uses no label, and its loss does not depend on how an evaluation is cut but by what is hidden."""
    cohort, words = small_cohort(), ("data.path=nowhere", "model.dropout=0.0")
    first = prepared(cohort, "task.kind=clinical-pretraining", *words)
    assert first.METRICS == ("loss",)
    torch.manual_seed(0)
    model, batch = first.model(), first.train.next(8, 0, 1)
    unlabelled = (*batch[:3], torch.full_like(batch[3], float("nan")))
    found = []
    for each in (batch, unlabelled):
        torch.manual_seed(1)
        found.append(first.loss(model, each, torch.tensor(8.0)))
    assert torch.equal(*found)
    found[0].backward()
    whole = first.metrics(first.validation(), first.measure(model.eval(), first.validation()).detach())
    assert whole == first.metrics(first.validation(), first.measure(model, first.validation()).detach())
    first.save(tmp_path / "export", model, {})
    begin = f"checkpoint.init_from={tmp_path / 'export'}"
    second = prepared(cohort, begin, "model.dropout=0.5")
    for name, weight in second.model().state_dict().items():
        assert torch.equal(weight, model.encoder.state_dict()[name])  # type: ignore[union-attr]
    for other, message in (
        ("task.fold=1", "learned from other stays than this run's training part"),
        ("model.mlp_dim=8", "has model.mlp_dim=16 and this run has 8"),
    ):
        with pytest.raises(ValueError, match=message):
            prepared(cohort, begin, other)
