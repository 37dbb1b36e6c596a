"""Sensor adapters as a task: numbers of sensors and their statistics, questions, the task's losses, the export."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from attnzoo.checkpoint.frozen import FrozenLM
from attnzoo.clinical.cohort import Cohort
from attnzoo.clinical.sensors import SensorQuestions, SensorStatistics, number_names, sensor_numbers
from attnzoo.clinical.trained_sensors import TrainedSensors, check_target, load_sensors, save_sensors
from attnzoo.models import SensorAdapter, SensorConfig
from tests.helpers import serving
from tests.helpers.clinical_data import small_wearables
from tests.helpers.cohort_task import prepared_task
from train.config_reader import load_config
from train.main import main
from train.tasks import SensorTask

QUESTIONS = "{fatigue: 'Tired?', stress: 'Stressed?'}"
MODEL = [f"task.questions={QUESTIONS}", "task.template='{question}{sensors}!'", "model.tokens=2", "model.hidden=5"]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving.export(tmp_path_factory.mktemp("lm"), "rcmha")


def prepared(cohort: Cohort, language_model: Path, *overrides: str) -> SensorTask:
    words = ["model.dtype=float32", *MODEL, f"model.language_model={language_model}", *overrides]
    return prepared_task(SensorTask, "phllm-pro.yaml", cohort, words)


def test_numbers_are_means_and_variances_of_what_was_measured() -> None:
    cohort = small_wearables()
    numbers_NF = sensor_numbers(cohort)
    assert number_names(cohort.grid.variables)[:3] == ("bedtime mean", "bedtime variance", "sleep_minutes mean")
    for row in (0, 7, 41):
        night_T = cohort.grid.values_NTV[row, :, 1]
        night_T = night_T[~np.isnan(night_T)].astype(np.float64)
        np.testing.assert_allclose(numbers_NF[row, 2:], [night_T.mean(), night_T.var()], rtol=2e-3)
    cohort.grid.values_NTV[5], cohort.grid.counts_NTV[5] = np.nan, 0
    rows = np.arange(0, 60)
    statistics = SensorStatistics.fit(cohort, rows)
    scaled_NF = statistics.standardised(cohort)
    assert scaled_NF[5].tolist() == [0.0] * 4
    learned_NF = numbers_NF[rows[rows != 5]].astype(np.float64)
    wanted_NF = (numbers_NF - np.nanmean(learned_NF, axis=0)) / np.nanstd(learned_NF, axis=0)
    others = np.arange(len(numbers_NF)) != 5
    np.testing.assert_allclose(scaled_NF[others], np.clip(np.nan_to_num(wanted_NF), -5, 5)[others], rtol=0, atol=1e-4)
    assert np.abs(scaled_NF).max() <= 5.0
    assert SensorStatistics.from_dict(json.loads(json.dumps(statistics.to_dict()))) == statistics
    with pytest.raises(ValueError, match="1 sensors over 3 days; the model learned from 2 over 3"):
        statistics.standardised(small_wearables(sensors=("bedtime",)))
    with pytest.raises(ValueError, match="3 names, 4 means and 4 deviations"):
        SensorStatistics.from_dict({**statistics.to_dict(), "names": ["a", "b", "c"]})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.kind=sensor-lmm"], "unknown task.kind 'sensor-lmm'; did you mean 'sensor-lm'"),
        (["task.shaer=1"], "unknown key task.shaer; did you mean 'share'"),
        (["task.share=0.0"], r"task.share=0.0 must be above 0 and at most 1"),
        (["task.template='{question} Data:'"], r"holds \{sensors\} 0 times, not once"),
        (["task.template='{sensors} {sensors} {question}'"], r"holds \{sensors\} 2 times, not once"),
        (["task.questions={}"], r"questions=\{\} asks nothing"),
        (["task.questions={mood: 7}"], "questions.mood=7 must be the text of a question"),
        (["model.numbers=40"], "model.numbers=40: the sensors and the language model determine it"),
        (["model.tokesn=2"], "unknown key model.tokesn; did you mean 'tokens'"),
        (["model.tokens=0"], "tokens=0 must be at least 1"),
        (["model.dtype=float31"], "unknown dtype 'float31'"),
        (["precision=bf16"], "precision=bf16: the clinical encoder has float32 weights"),
        (["checkpoint.init_from=x"], "task.kind=sensor-lm has no use for checkpoint.init_from='x'"),
        (["sample.every=5"], "task.kind=sensor-lm has no use for sample="),
    ],
)
def test_wrong_options_are_refused_by_name_before_anything_is_read(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config("phllm-pro.yaml", overrides)


def test_what_does_not_fit_is_refused(language_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cohort = small_wearables()
    cohort.labels["mood"] = np.zeros(len(cohort), np.float32)
    for overrides, message in (
        (["task.questions={los: 'Long?'}"], "task.questions: cohort 'made up' has no label 'los'"),
        (["task.template='" + "word " * 900 + "{question}{sensors}'"], "task.template: a prompt takes .*; shorten it"),
        (
            ["task.questions={mood: 'Bad?'}"],
            "task.questions: the cohort of 120 days has no 'mood' of both kinds: it is 0",
        ),
        (["model.language_model=nowhere"], "checkpoint='nowhere' was not found"),
        (["task.answers=[' Yes', ' Yes']"], "two answers have the same tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            prepared(cohort, language_model, *overrides)
    days = replace(cohort, labels={**cohort.labels, "fatigue": np.arange(120, dtype=np.float32)})
    with pytest.raises(ValueError, match="label 'fatigue' of cohort 'made up' is not one 0 or 1 for each row"):
        prepared(days, language_model)
    options = ["data.path=nowhere.tar.gz", f"run_dir={tmp_path / 'run'}", f"model.language_model={language_model}"]
    assert main(["--config", "phllm-pro.yaml", "--dry-run", *options]) == 2
    assert "nowhere.tar.gz" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_test_rows_change_nothing_that_is_learned(language_model: Path) -> None:
    cohort = small_wearables()
    task = prepared(cohort, language_model, "task.share=0.5")
    test = task.fold.test
    values_NTV, stress_N = cohort.grid.values_NTV.copy(), cohort.labels["stress"].copy()
    values_NTV[test] *= 3
    stress_N[test] = 0.0
    others = replace(
        cohort, grid=replace(cohort.grid, values_NTV=values_NTV), labels={**cohort.labels, "stress": stress_N}
    )
    other = prepared(others, language_model, "task.share=0.5")
    assert other.statistics == task.statistics
    assert task.statistics.rows == len(task.learned) == round(len(task.fold.train) / 2)
    seen = set()
    for _ in range(4):
        mine, theirs = task.train.next(8, 0, 1), other.train.next(8, 0, 1)
        assert all(torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)) for x, y in zip(mine, theirs, strict=True))
        seen |= {tuple(row) for row in mine[0].tolist()}
    assert seen <= {tuple(row) for row in task.numbers[task.learned].tolist()}
    assert other.content()["data (content)"] != task.content()["data (content)"]
    # The last days of every person are the test's.
    for person in set(cohort.patient_ids or ()):
        mine = np.array(cohort.patient_ids) == person
        assert cohort.dates[task.fold.train][mine[task.fold.train]].max() < cohort.dates[test][mine[test]].min()


def test_a_loss_is_the_same_however_rows_are_cut(language_model: Path) -> None:
    task = prepared(small_wearables(), language_model)
    torch.manual_seed(0)
    model, batch = task.model().eval(), task.validation()
    assert torch.isnan(batch[1]).any()
    count = torch.tensor(float(task.count(batch)))
    whole = task.loss(model, batch, count)
    parts = [task.loss(model, tuple(t[i : i + 2] for t in batch), count) for i in range(0, len(batch[0]), 2)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-4, atol=0)
    scores_NQ, known = task.measure(model, batch).detach(), ~torch.isnan(batch[1])
    by_hand = F.binary_cross_entropy_with_logits(scores_NQ[known], batch[1][known])
    torch.testing.assert_close(whole.detach(), by_hand, rtol=1e-5, atol=0)
    assert task.metrics(batch, scores_NQ)["loss"] == pytest.approx(float(by_hand), rel=1e-5)
    perfect = task.metrics(batch, torch.nan_to_num(batch[1]))
    assert (perfect["auroc"], perfect["auprc"], task.score(perfect)) == (1.0, 1.0, 1.0)
    assert all(np.isnan(value) for value in task.metrics(batch, scores_NQ * float("nan")).values())
    whole.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert set(model.state_dict()) == {
        f"{name}.{kind}"
        for name in ("hidden.0", "hidden.3", "hidden.6", "hidden.9", "output")
        for kind in ("weight", "bias")
    }


def test_an_export_predicts_with_its_statistics_and_its_language_model_alone(
    language_model: Path, tmp_path: Path
) -> None:
    cohort = small_wearables()
    task = prepared(cohort, language_model)
    torch.manual_seed(0)
    model = task.model().eval()
    task.save(tmp_path / "export", model, {"steps": 3})
    trained = load_sensors(tmp_path)
    found_NQ = trained.predict(cohort, task.fold.validation)
    with torch.no_grad():
        wanted_NQ = task.measure(model, task.validation()).sigmoid().numpy()
    np.testing.assert_allclose(found_NQ, wanted_NQ, rtol=0, atol=1e-6)
    assert trained.questions.labels == ("fatigue", "stress")
    assert (trained.metadata, trained.split["split"], trained.data["days"]) == ({"steps": 3}, "time", 15)
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == [
        "config.json", "model.safetensors", "statistics.json",
    ]  # fmt: skip
    check_target(tmp_path / "export")
    # Another language model under the same name is refused, by its weights alone.
    frozen = FrozenLM.load(str(language_model))
    frozen.model.blocks[1].mlp.down.weight.data[3, 4] += 1e-3
    with pytest.raises(ValueError, match=r"trained with another language model than .* in float32 \(their digests"):
        load_sensors(tmp_path, frozen)
    (tmp_path / "export" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds 'notes\.txt' beside the model"):
        save_sensors(tmp_path / "export", trained)
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    for changed, message in (
        ({**config, "format": "attnzoo-ehr-1"}, "format 'attnzoo-ehr-1' is not 'attnzoo-sensors-1'"),
        ({**config, "modle": 1}, "unknown key modle"),
        ({**config, "model": {**config["model"], "hidden": 6}}, "is damaged .*size mismatch.*; export the model again"),
        ({**config, "questions": {"template": "x"}}, r"is damaged .*holds \{sensors\} 0 times"),
    ):
        (tmp_path / "export" / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            load_sensors(tmp_path, frozen)
    with pytest.raises(ValueError, match="holds no trained model of format"):
        load_sensors(tmp_path / "nothing")


def test_zeroed_tokens_tell_the_question_alone(language_model: Path) -> None:
    task = prepared(small_wearables(), language_model)
    trained = TrainedSensors(task.model(), task.language_model, task.statistics, task.questions)
    zeroed = trained.scores_of(torch.zeros(9, 2, 32))
    assert (zeroed == zeroed[:1]).all()
    assert zeroed[0, 0] != zeroed[0, 1]
    numbers = task.numbers[:9]
    np.testing.assert_allclose(trained.scores(numbers), trained.scores_of(trained.adapter(numbers).detach()), atol=1e-6)


def test_questions_have_the_same_prompts_whatever_stands_in_them() -> None:
    tokenizer = serving.tokenizer()
    asked = SensorQuestions(questions={"a": "Tired?", "b": "{sensors}?"}, template="Q: {question} {sensors} A:")
    first, second = asked.prompts(tokenizer)
    assert first.after == second.after == tuple(tokenizer.encode(" A:"))
    assert first.before == tuple(tokenizer.encode("Q: Tired? ", bos=True))
    assert SensorConfig(numbers=4, width=8).tokens == 10
    assert SensorAdapter(SensorConfig(numbers=4, width=8))(torch.zeros(3, 4)).shape == (3, 10, 8)
