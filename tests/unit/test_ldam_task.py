"""LDAM as a task: what it refuses, what it learns from, its loss, its export, and what explains its predictions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from attnzoo.clinical.cohort import Cohort
from attnzoo.clinical.explain import CellMap, by_chance
from attnzoo.clinical.explain_words import (
    LabelLogit,
    TextWords,
    word_attention,
    word_findings,
    word_gradients,
    word_rarity,
)
from attnzoo.clinical.faithfulness import faithfulness, randomisation_check, removal
from attnzoo.clinical.trained_ldam import TrainedLdam, load_ldam
from attnzoo.clinical.words import Vocabulary
from attnzoo.models import Ldam, LdamConfig, LdamInputs
from tests.helpers.clinical_texts import TOPICS, text_cohort
from tests.helpers.cohort_task import prepared_task
from train.config_reader import load_config
from train.tasks import LdamTask

SMALL = ["model.model_dim=16", "task.least=1", "task.validation=0.3"]


def prepared(cohort: Cohort, *overrides: str) -> LdamTask:
    """The task on a cohort that is in memory."""
    return prepared_task(LdamTask, "ldam-sections.yaml", cohort, [*SMALL, *overrides])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.kind=ldma"], "unknown task.kind 'ldma'; did you mean 'ldam'"),
        (["task.lable=[CC]"], "unknown key task.lable; did you mean 'label"),
        (["task.split=time"], "task.split='time' is not one of 'patient', 'stay'"),
        (["task.longest=0"], "task.longest=0 must be at least 1"),
        (["task.explained=-1"], "task.explained=-1 must be at least 0"),
        (["task.definitions={CC: 3}"], "task.definitions.CC=3 must say in words"),
        (["model.vocab_size=8"], "model.vocab_size=8: the cohort and the task determine it"),
        (["model.skpi=true"], "unknown key model.skpi; did you mean 'skip'"),
        (["model.hide_words=1.0"], "hide_words=1.0 must be at least 0 and below 1"),
        (["checkpoint.init_from=x"], "task.kind=ldam has no use for checkpoint.init_from='x'"),
    ],
)
def test_wrong_options_are_refused_by_name_before_anything_is_read(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config("ldam-sections.yaml", overrides)


def test_what_does_not_fit_the_cohort_is_refused() -> None:
    cohort = text_cohort()
    three = replace(cohort, labels={**cohort.labels, "CC": np.ones(60, np.float32)})
    for given, overrides, message in (
        (cohort, ["task.labels=[death]"], "task.labels: cohort 'made up texts' has no label 'death'"),
        (cohort, ["task.labels=[CC, LABS]"], "model.exclusive=true: some stays have no label or several"),
        (three, [], "model.exclusive=true: some stays"),
        (
            replace(cohort, labels={"CC": np.ones(60)}),
            [],
            "task.labels: the cohort of 60 dialogues has no 'CC' of both kinds",
        ),
        (replace(cohort, labels={"mine": cohort.labels["CC"]}), ["model.exclusive=false"], "'mine' has no definition"),
        (replace(cohort, labels={"CC": np.full(60, 2.0)}), [], "task.labels: 'CC' is not one 0 or 1"),
        (replace(cohort, texts=None), [], "task.kind=ldam reads texts, and data.format=mts_dialog has none"),
        (cohort, ["task.split=patient"], "task.split=patient: cohort 'made up texts' has no patient identifiers"),
    ):
        with pytest.raises(ValueError, match=message):
            prepared(given, *overrides)
    mine = prepared(
        replace(cohort, labels={"mine": cohort.labels["CC"]}),
        "task.definitions={mine: a burn}",
        "model.exclusive=false",
    )
    assert mine.told == ("a burn",)
    assert mine.METRICS == ("loss", "macro_auroc")


def test_test_rows_change_nothing_that_is_learned() -> None:
    """Other texts, series and labels of test rows: the same vocabulary, statistics, weights and batches."""
    cohort = text_cohort(variables=("HR", "Temp"))
    task = prepared(cohort)
    texts, values_NTV = np.array(cohort.texts, dtype=object), cohort.grid.values_NTV.copy()
    texts[task.fold.test], values_NTV[task.fold.test] = "unheard words " * 9, 500.0
    other = prepared(replace(cohort, texts=tuple(texts), grid=replace(cohort.grid, values_NTV=values_NTV)))
    assert (other.vocabulary, other.statistics) == (task.vocabulary, task.statistics)
    assert "unheard" not in task.vocabulary.words
    assert {"penicillin", "vaccines"} & set(task.vocabulary.words) == {"penicillin"}  # LABS' words, not IMMUNIZATIONS'
    models = []
    for each in (task, other):
        torch.manual_seed(0)
        models.append(each.model().state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    found = task.model()
    documents = [set(task.vocabulary.encode(cohort.texts[row])) for row in task.fold.train]  # type: ignore[index]
    documents += [set(task.vocabulary.encode(text)) for text in task.told]
    word = task.vocabulary.encode("penicillin")[0]
    rare = 1 + np.log((1 + len(documents)) / (1 + sum(word in each for each in documents)))
    assert float(found.rarity_W[word]) == pytest.approx(rare)
    for _ in range(4):
        mine, theirs = task.train.next(4, 0, 1), other.train.next(4, 0, 1)
        assert all(torch.equal(*pair) for pair in zip(mine, theirs, strict=True))
    assert other.content()["data (content)"] != task.content()["data (content)"]
    random = prepared(cohort, "task.vectors=random").model().text.embedding.weight
    assert not torch.allclose(random, models[0]["text.embedding.weight"])


@pytest.mark.parametrize("exclusive", [True, False])
def test_a_loss_is_the_same_however_rows_are_cut(exclusive: bool) -> None:
    task = prepared(text_cohort(variables=("HR",)), f"model.exclusive={str(exclusive).lower()}")
    torch.manual_seed(0)
    model, batch = task.model().eval(), task.validation()
    count = torch.tensor(float(task.count(batch)))
    whole = task.loss(model, batch, count)
    parts = [task.loss(model, tuple(t[i : i + 5] for t in batch), count) for i in range(0, len(batch[0]), 5)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=0)
    logits, labels = task.measure(model, batch).detach(), batch[-1]
    by_label = F.binary_cross_entropy_with_logits(logits, labels)
    by_row = -(labels * logits.log_softmax(1)).sum(1).mean()
    metrics = task.metrics(batch, logits)
    assert metrics["loss"] == pytest.approx(float(by_row if exclusive else by_label), rel=1e-5)
    assert float(whole.detach()) > metrics["loss"], "definitions have a loss too"
    assert tuple(metrics) == task.METRICS
    assert task.score(metrics) == sum(metrics[name] for name in task.METRICS[1:])
    assert all(np.isnan(value) for value in task.metrics(batch, logits * torch.nan).values())


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LdamTask]:
    """An export of a model that some steps taught which words decide."""
    torch.manual_seed(0)
    task = prepared(text_cohort(300), "model.dropout=0.1", "model.skip=false")
    model = task.model()
    steps = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(60):
        batch = task.train.next(32, 0, 1)
        steps.zero_grad()
        task.loss(model, batch, torch.tensor(32.0)).backward()
        steps.step()
    directory = tmp_path_factory.mktemp("ldam") / "export"
    task.check_target(directory)
    task.save(directory, model.eval(), {"steps": 60})
    return directory, task


def test_an_export_predicts_what_the_run_did(learned: tuple[Path, LdamTask]) -> None:
    directory, task = learned
    trained, test = load_ldam(directory), task.fold.test
    found_NK = trained.predict(task.cohort, test)
    assert found_NK.sum(1) == pytest.approx(1.0)
    assert (found_NK.argmax(1) == task.labels[test].argmax(1)).mean() > 0.9
    again = task.measure(trained.model, task.batch(test)).detach()
    assert np.allclose(found_NK, trained.probabilities(again.numpy()), rtol=0, atol=1e-6)
    assert task.cohort.texts is not None
    of_texts = trained.predict_texts([task.cohort.texts[row] for row in test])
    assert np.allclose(found_NK, of_texts, rtol=0, atol=1e-6)
    assert np.allclose(trained.predict(task.cohort, test, batch_size=7), found_NK, rtol=0, atol=1e-6)
    assert trained.labels == tuple(TOPICS)
    assert (trained.data["format"], trained.split["fold"], trained.metadata) == ("mts_dialog", 0, {"steps": 60})
    task.save(directory, trained.model, {"steps": 60})  # replaces an earlier one
    with pytest.raises(ValueError, match="has no texts; load it with them"):
        trained.predict(replace(task.cohort, texts=None))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("vocabulary.json", ("<unknown>", "<what>"), "is damaged .*must begin with '<unknown>'"),
        ("vocabulary.json", ('"penicillin",', ""), "is damaged .*vocabulary has"),
        ("config.json", ("attnzoo-ldam-1", "attnzoo-ehr-1"), "format 'attnzoo-ehr-1' is not 'attnzoo-ldam-1'"),
        ("config.json", ('"longest"', '"longer"'), "unknown key longer; did you mean 'longest'"),
        ("config.json", ('"CC"', '"CC", "more"'), "is damaged .*labels has 4 entries; the model has 3"),
        ("model.safetensors", None, "is damaged"),
    ],
)
def test_damaged_exports_are_refused_by_file(learned, tmp_path: Path, file: str, change, message: str) -> None:
    copy = tmp_path / "copy"
    learned[1].save(copy, load_ldam(learned[0]).model, {})
    if change is None:
        (copy / file).unlink()
    else:
        (copy / file).write_text((copy / file).read_text().replace(*change))
    with pytest.raises(ValueError, match=message):
        load_ldam(copy)


def seen(trained: TrainedLdam, cohort: Cohort, rows: np.ndarray) -> TextWords:
    words_NL, lengths_N = trained.inputs(cohort, rows)
    return TextWords(words_NL, lengths_N, torch.from_numpy(trained.logits(cohort, rows).argmax(1)))


def test_planted_words_are_found(learned: tuple[Path, LdamTask]) -> None:
    """At least .8 of the two most important words of a text are those that decide; a map of the gradients is more
    faithful than chance, and is not that of a model that has learned nothing."""
    trained, task = load_ldam(learned[0]), learned[1]
    words = seen(trained, task.cohort, task.fold.test)
    planted = torch.tensor([i for pair in TOPICS.values() for i in trained.vocabulary.encode(" ".join(pair))])
    decides = torch.isin(words.words_NL, planted)[..., None]
    gradients = word_gradients(LabelLogit(trained.model), words)
    for found in (gradients, word_attention(trained.model, words)):
        top = found.values_NTV.flatten(1).topk(2, dim=1).indices
        assert float(decides.flatten(1).gather(1, top).float().mean()) >= 0.8, found.name
    rarity_W = torch.ones(len(trained.vocabulary))
    measured = faithfulness(LabelLogit(trained.model), words, [gradients], plain=word_rarity(rarity_W, words))
    assert list(measured) == ["integrated gradients", "tf-idf", "random"]
    assert measured["integrated gradients"].beats_random
    assert not measured["random"].beats_random
    few = words.rows(slice(20))
    rho = randomisation_check(lambda m: word_gradients(LabelLogit(m), few, tolerance=0.5), trained.model, few)
    assert abs(rho) < 0.3
    text = task.cohort.texts[task.fold.test[0]]  # type: ignore[index]
    told = word_findings(gradients, trained, 0, text, most=2)
    assert {one.word for one in told} <= {word for pair in TOPICS.values() for word in pair}
    assert all(text[one.start : one.end] == one.word and one.amount > 0 for one in told)


@pytest.mark.parametrize("exclusive", [True, False])
def test_attributions_of_words_are_complete_and_removal_is_by_hand(exclusive: bool) -> None:
    """Of all forms of the model at once: blocks under it, weights of each label, their mean, and the linear head."""
    config = LdamConfig(
        vocab_size=19, definitions=((1, 2), (3,), (4, 5)), model_dim=8, num_heads=2, mlp_dim=8, pooling="each",
        mean=True, skip=True, exclusive=exclusive,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Ldam(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(1, 19, (4, 9))
    ids[0, 2] = 0
    words = TextWords(ids, torch.tensor([9, 5, 1, 0]), torch.tensor([0, 2, 1, 1]))
    logit = LabelLogit(model)
    found = word_gradients(logit, words, tolerance=1e-3).values_NTV
    nothing = replace(words, words_NL=torch.zeros_like(ids))

    def log_odds(ids_NL: torch.Tensor, presence_NL: torch.Tensor) -> list[float]:
        logits = model(LdamInputs(words_NL=ids_NL, lengths_N=words.lengths_N, presence_NL=presence_NL))
        chance = logits.softmax(1) if exclusive else logits.sigmoid()
        mine = chance[torch.arange(4), words.labels_N]
        return (mine / (1 - mine)).log().tolist()

    ones = torch.ones(4, 9, dtype=torch.float64)
    whole, empty = log_odds(ids, ones), log_odds(ids, ones * 0)
    assert logit.without(words).tolist() == pytest.approx(whole, abs=1e-9)
    assert empty != pytest.approx(whole, abs=0.1)
    assert not nothing.observed.any()
    sums = found.sum((1, 2)).tolist()
    assert sums == pytest.approx([a - b for a, b in zip(whole, empty, strict=True)], rel=1e-3, abs=1e-3)
    assert not found[~words.observed].any()
    chance = by_chance(words, 3)
    removed = removal(logit, words, CellMap("any", chance.values_NTV, signed=False))
    first = ones.clone()
    first[1, int(chance.values_NTV[1, :5, 0].argmax())] = 0.0  # 1, 5, 10 and 20 % of five words are one word
    gone = log_odds(ids, first)[1]
    sign = np.sign(whole[1] - empty[1])
    assert removed.comprehensiveness_NK[1, :4].tolist() == pytest.approx([sign * (whole[1] - gone)] * 4, abs=1e-9)
    for change, told in (
        ({"labels_N": torch.tensor([0, 0, 0, 3])}, "the model has labels 0 to 2"),
        ({"lengths_N": torch.tensor([1])}, "lengths_N has shape"),
    ):
        with pytest.raises(ValueError, match=told):
            logit.without(replace(words, **change))
    with pytest.raises(ValueError, match="is in training mode"):
        LabelLogit(model.train())
    with pytest.raises(ValueError, match="plain is None"):
        faithfulness(logit, words, [])


def test_a_vocabulary_of_another_size_is_no_model_s() -> None:
    model = Ldam(LdamConfig(vocab_size=2, definitions=((1,),), model_dim=4, num_heads=1, mlp_dim=4))
    with pytest.raises(ValueError, match="vocabulary has 1 entries; the model has 2"):
        TrainedLdam(model, Vocabulary(("<unknown>",)), ("CC",), ("burn",), 9)
