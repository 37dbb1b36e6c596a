"""POST /v1/predict of models that read texts: the model's own numbers, words where they stand, and what is refused."""

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from starlette.testclient import TestClient

from attnzoo.clinical.trained_ldam import TrainedLdam, load_ldam
from attnzoo.clinical.words import spans
from serve.clinical.describe import example_of
from serve.clinical.notes import reader as reader_module
from serve.clinical.notes.protocol import MAX_CHARACTERS
from tests.helpers.clinical_models import ask, clinical_client, export, icu_cohort, request_of, small_trained
from tests.helpers.clinical_notes import NAME, export_notes, notes_request
from tests.helpers.clinical_texts import TOPICS, text_cohort
from tests.helpers.engines import SECRET

TEXT = "Doctor: how are you?\nPatient: I am fine, 𝒳 penicillin, rash today and well."
FHIR = "application/fhir+json"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ("task.longest=24", "task.explained=12")
    return export_notes(tmp_path_factory.mktemp("notes"), None, *words, steps=50)


@pytest.fixture(scope="module")
def trained(run: Path) -> TrainedLdam:
    return load_ldam(run)


@pytest.fixture(scope="module")
def client(run: Path) -> Iterator[TestClient]:
    with clinical_client(run) as client:
        yield client


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A model of series and texts, which learned from stays without texts too, beside one of measurements alone."""
    cohort, path = text_cohort(60, variables=("HR", "Temp")), tmp_path_factory.mktemp("both")
    texts = tuple("" if row % 9 == 0 else text for row, text in enumerate(cohort.texts or ()))
    notes = export_notes(path, replace(cohort, texts=texts), "model.exclusive=false", "model.pooling=shared")
    tiny = export(path, small_trained(icu_cohort(), judged=0)).parent
    with clinical_client(tiny, clinical=str(notes)) as client:
        yield client


def test_probabilities_are_those_of_the_model(client: TestClient, trained: TrainedLdam) -> None:
    """Together and alone; with intervals, definitions and base rates."""
    texts = [*(f"{text} and i am fine today" for text in text_cohort(6, seed=5).texts or ()), TEXT]
    expected_NK = trained.predict_texts(texts)
    reply = ask(client, notes_request(*texts))
    assert trained.calibration is not None
    assert trained.evidence is not None
    low_NK, high_NK = trained.calibration.interval(_logits(trained, texts))
    for row, one in enumerate(reply["patients"]):
        assert (one["id"], one["status"], one["reasons"]) == (f"p{row}", "ok", [])
        assert [each["label"] for each in one["labels"]] == list(TOPICS)
        assert [each["probability"] for each in one["labels"]] == pytest.approx(list(expected_NK[row]), abs=1e-6)
        assert [each["low"] for each in one["labels"]] == pytest.approx(
            list(np.minimum(low_NK, expected_NK)[row]), abs=1e-6
        )
        assert [each["high"] for each in one["labels"]] == pytest.approx(
            list(np.maximum(high_NK, expected_NK)[row]), abs=1e-6
        )
        (alone,) = ask(client, notes_request(texts[row]))["patients"]
        assert alone["input_digest"] == one["input_digest"]
        assert alone["labels"][0]["probability"] == pytest.approx(one["labels"][0]["probability"], abs=1e-6)
    assert max(each["high"] - each["low"] for one in reply["patients"] for each in one["labels"]) > 1e-3
    outcome = reply["outcome"]
    assert (outcome["kind"], outcome["exclusive"]) == ("labels", True)
    assert [each["definition"] for each in outcome["labels"]] == list(trained.definitions)
    assert [each["base_rate"] for each in outcome["labels"]] == pytest.approx(list(trained.evidence.shares))
    assert "one temperature for all labels" in reply["interval"]["words"]
    assert reply["model"]["training_stays"] == trained.evidence.stays
    assert "For research only" in reply["research_use_only"]
    assert reply["patients"][-1]["labels"][0]["probability"] > 0.6, "penicillin and rash speak of an allergy"


def _logits(trained: TrainedLdam, texts: list[str]) -> np.ndarray:
    words_NL, lengths_N = trained.vocabulary.inputs(texts, trained.longest)
    found: np.ndarray = trained.model(reader_module.inputs_of((words_NL, lengths_N))).detach().numpy()
    return found


def test_explanations_point_at_words_of_the_given_text(client: TestClient) -> None:
    """Offsets count characters, also after one that UTF-16 writes as two; sums are complete; attention is a share."""
    reply = ask(client, notes_request(TEXT, explain="gradients"))
    (one,) = reply["patients"]
    assert [(word["start"], word["end"]) for word in one["words"]] == spans(TEXT)
    assert all(TEXT[word["start"] : word["end"]] == word["word"] for word in one["words"])
    (found,) = one["explanations"]
    assert (found["signed"], found["unit"]) == (True, "logit")
    assert found["faithful"] in (True, False)
    assert found["faithfulness"].startswith("On 12 texts integrated gradients")
    assert [each["label"] for each in found["labels"]] == list(TOPICS)
    by_label = {}
    for each in found["labels"]:
        assert each["explains"] == f"the log odds of {each['label']} against all other labels"
        weights = dict(zip((word["word"] for word in one["words"]), each["weights"], strict=True))
        assert [weight is None for weight in each["weights"]] == [not word["known"] for word in one["words"]]
        total = each["log_odds"] - each["log_odds_without_words"]
        assert sum(w or 0.0 for w in each["weights"]) == pytest.approx(total, abs=0.05 * max(1, abs(total)))
        assert weights["𝒳"] is None
        known = {word: weight for word, weight in weights.items() if weight is not None}
        by_label[each["label"]] = known
    allergy = by_label.pop("ALLERGY")
    assert set(sorted(allergy, key=allergy.__getitem__)[-2:]) == {"penicillin", "rash"}
    assert min(allergy["penicillin"], allergy["rash"]) > 0.3
    assert all(allergy[word] > other[word] for other in by_label.values() for word in ("penicillin", "rash"))
    shown = ask(client, notes_request(TEXT, explain="attention", explain_labels=["LABS"]))["patients"][0]
    (seen,) = shown["explanations"]
    assert (seen["signed"], seen["unit"], [each["label"] for each in seen["labels"]]) == (False, "share", ["LABS"])
    assert "not what it did to the prediction" in seen["title"]
    assert "the same for all labels" not in seen["title"]
    assert 0.5 < sum(w or 0.0 for w in seen["labels"][0]["weights"]) <= 1 + 1e-6
    assert seen["labels"][0]["log_odds"] is None
    plain = ask(client, notes_request(TEXT))["patients"][0]
    assert (plain["words"], plain["explanations"]) == ([], [])
    assert plain["labels"] == one["labels"]


def test_a_long_text_is_read_from_its_beginning_and_the_reply_says_where_that_ended(client: TestClient) -> None:
    long = f"{TEXT} " * 3
    whole, begun = ask(client, notes_request(long, long[: spans(long)[23][1]], explain="gradients"))["patients"]
    told = whole["text"]
    assert (told["cut"], told["tokens"], told["tokens_read"]) == (True, len(spans(long)), 24)
    assert told["read_until"] == spans(long)[23][1]
    assert f"from character {told['read_until']} on nothing was read" in told["cut_reason"]
    assert len(whole["words"]) == len(whole["explanations"][0]["labels"][0]["weights"]) == 24
    assert (begun["text"]["cut"], begun["text"]["cut_reason"]) == (False, None)
    for one, other in zip(whole["labels"], begun["labels"], strict=True):
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-6)
    assert whole["input_digest"] == begun["input_digest"]


def test_without_enough_known_words_there_is_no_number(client: TestClient, trained: TrainedLdam) -> None:
    assert trained.evidence is not None
    assert trained.evidence.least_known > 2
    assert trained.evidence.least_share > 0.5
    texts = ["", " \n\t", "?! 12", "unheard zzz", "rash", "am " * 9 + "zz " * 9, f"{'am ' * 20}"]
    patients = ask(client, notes_request(*texts, explain="attention"))["patients"]
    for one, words in zip(
        patients,
        (
            "the text has no word",
            "the text has no word",
            "the text has no word",
            "no word of the text is known",
            "1 of the text's words",
            "50% of the",
        ),
        strict=False,
    ):
        assert one["status"] == "not_enough_data"
        assert words in one["reasons"][0]
        assert (one["labels"], one["explanations"]) == ([], [])
    assert (patients[-1]["status"], patients[-1]["reasons"]) == ("ok", [])


def test_series_are_read_beside_the_text(both: TestClient) -> None:
    """Where the model has them; every value is accounted for as of other models, and moves the numbers."""
    heart = {"variable": "HR", "hour": 0.25, "value": 92, "unit": "/min"}
    warm = {"variable": "Temp", "hour": 1.5, "value": 100.9, "unit": "[degF]"}
    odd = {"variable": "Lactate", "hour": 1, "value": 3, "unit": "mmol/L"}
    body = notes_request(TEXT, TEXT, "", explain="gradients")
    for patient, given in zip(body["patients"], ([heart, warm, odd], None, [heart, warm]), strict=True):
        patient |= {"measurements": given, "cutoff_hour": 3}
    reply = ask(both, body)
    first, without, silent = reply["patients"]
    assert [one["name"] for one in reply["variables"]] == ["HR", "Temp"]
    assert (first["status"], first["cutoff_hour"]) == ("ok", 3)
    assert first["measurements"]["rejected"] == {"unknown variable": 1}
    assert first["coverage"]["measured"] == pytest.approx(2 / 6)
    assert without["reasons"] == ["no value of the model's variables is known"]
    assert silent["status"] == "ok", "it learned from stays without a text"
    moved = notes_request(TEXT)
    moved["patients"][0] |= {"measurements": [{**heart, "value": 150}, warm], "cutoff_hour": 3}
    (other,) = ask(both, {**moved, "explain": "attention"})["patients"]
    assert other["input_digest"] != first["input_digest"]
    assert other["labels"][0]["probability"] != first["labels"][0]["probability"]
    assert "it is the same for all labels" in other["explanations"][0]["title"]
    for each in first["explanations"][0]["labels"]:
        assert each["explains"] == f"the log odds of {each['label']}"
        total = each["log_odds"] - each["log_odds_without_words"]
        assert sum(w or 0.0 for w in each["weights"]) == pytest.approx(total, abs=0.05 * max(1, abs(total)))


def test_two_clinical_models_on_one_server(both: TestClient) -> None:
    """Each is asked by its own fields, and FHIR goes to the one that reads it."""
    cards = both.get("/v1/models").json()["data"]
    assert [(one["id"], one["reads"]) for one in cards] == [
        ("tiny", ["measurements"]),
        (NAME, ["text", "measurements"]),
    ]
    assert ask(both, request_of(icu_cohort(), [0]))["outcome"]["kind"] == "yes_no"
    for model in both.app.state.clinic.models:
        assert ask(both, example_of(model))["model"]["id"] == model.name
    error = ask(both, {**request_of(icu_cohort(), [0]), "model": NAME}, status=400)
    assert error["param"] == "patients[0].age_years"
    error = ask(both, {**notes_request(TEXT), "model": "tiny"}, status=400)
    assert error["param"] == "patients[0].text"
    assert ask(both, {"patients": []}, status=400)["param"] == "model"
    assert "this server has 'tiny', 'notes'" in ask(both, {"model": "x", "patients": []}, status=404)["message"]
    empty = both.post("/v1/predict", content=b'{"resourceType": "Bundle"}', headers={"content-type": FHIR})
    assert "there is no Encounter" in empty.json()["error"]["message"], "it was read by the model of measurements"


def test_fhir_is_refused_by_name(client: TestClient) -> None:
    for query in ("", f"?model={NAME}"):
        answer = client.post(
            f"/v1/predict{query}", content=b'{"resourceType": "Bundle"}', headers={"content-type": FHIR}
        )
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
        assert "'notes' reads texts, and is not asked with FHIR resources; send JSON" in answer.text
    error = ask(client, notes_request(TEXT), status=400, headers={"accept": FHIR})
    assert (error["param"], "accept application/json" in error["message"]) == ("accept", True)


PATIENT = "patients[0]"
HOSTILE: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    # (fields of the request, fields of the patient, the field that is named, words)
    ({"model": "other"}, {}, "model", "does not exist; this server has 'notes'"),
    ({"model": 3}, {}, "model", "model=3 must be a valid string"),
    ({"model": None}, {}, "model", "model=null must be a valid string"),
    ({"patients": []}, {}, "patients", "at least 1 item"),
    ({"patients": "text"}, {}, "patients", "must be a valid list"),
    ({"patients": ["text"]}, {}, "patients[0]", "must be a valid dictionary"),
    ({"text": TEXT}, {}, "text", "unknown field 'text'"),
    ({"texts": [TEXT]}, {}, "texts", "unknown field 'texts'"),
    ({"explain": "lime"}, {}, "explain", "must be 'none', 'attention' or 'gradients'"),
    ({"explain": None}, {}, "explain", "must be 'none'"),
    ({"explain_labels": ["LABS"]}, {}, "explain_labels", "has no effect without explain"),
    ({"explain": "attention", "explain_labels": []}, {}, "explain_labels", "at least 1 item"),
    ({"explain": "attention", "explain_labels": "LABS"}, {}, "explain_labels", "must be a valid list"),
    ({"explain": "attention", "explain_labels": ["LAB"]}, {}, "explain_labels[0]", "'LAB' is no label of this model"),
    ({"explain": "attention", "explain_labels": ["CC", "CC"]}, {}, "explain_labels[1]", "is given twice"),
    ({"hourly": True}, {}, "hourly", "hourly is for models of measurements: a text is not read hour by hour"),
    ({"stream": True}, {}, "stream", "stream is for models of measurements: a text is not read hour by hour"),
    ({"cutoff_hour": 3}, {}, "cutoff_hour", "'notes' reads texts alone; leave it out"),
    ({}, {"text": None}, f"{PATIENT}.text", "must be a valid string"),
    ({}, {"text": 7}, f"{PATIENT}.text", "must be a valid string"),
    ({}, {"text": True}, f"{PATIENT}.text", "must be a valid string"),
    ({}, {"text": [TEXT]}, f"{PATIENT}.text", "must be a valid string"),
    ({}, {"text": {"value": TEXT}}, f"{PATIENT}.text", "must be a valid string"),
    ({}, {"text": "a" * (MAX_CHARACTERS + 1)}, f"{PATIENT}.text", f"must have at most {MAX_CHARACTERS} characters"),
    ({}, {"text": "a\x00b"}, f"{PATIENT}.text", "control character U+0000 at character 1"),
    ({}, {"text": "\x1b[31mred"}, f"{PATIENT}.text", "control character U+001B at character 0"),
    ({}, {"text": "said \x93fine\x94"}, f"{PATIENT}.text", "U+0093 at character 5, which no note has; decode it"),
    ({}, {"text": "\x7f"}, f"{PATIENT}.text", "U+007F"),
    ({}, {"txt": TEXT}, f"{PATIENT}.txt", "did you mean 'text'"),
    ({}, {"age_years": 60}, f"{PATIENT}.age_years", "unknown field"),
    ({}, {"series": []}, f"{PATIENT}.series", "known: id, text"),
    ({}, {"id": ""}, f"{PATIENT}.id", "at least 1 character"),
    ({}, {"id": 4}, f"{PATIENT}.id", "must be a valid string"),
    ({}, {"measurements": []}, f"{PATIENT}.measurements", "'notes' reads texts alone; leave it out"),
    ({}, {"measurements": [{"variable": "HR", "hour": 1, "value": 80, "unit": "/min"}]}, f"{PATIENT}.measurements",
     "reads texts alone"),
    ({}, {"admitted": "2026-03-01T08:00:00Z"}, f"{PATIENT}.admitted", "reads texts alone"),
    ({}, {"cutoff_hour": 0}, f"{PATIENT}.cutoff_hour", "reads texts alone"),
    ({"patients": [{"id": "a"}]}, {}, "patients[0].text", "patients[0].text is missing"),
    ({"patients": [{"text": TEXT}]}, {}, "patients[0].id", "patients[0].id is missing"),
    ({"patients": [{"id": "a", "text": ""}] * 2}, {}, "patients[1].id", "is that of patients[0] too"),
    ({"patients": [{"id": str(i), "text": ""} for i in range(65)]}, {}, "patients", "max_patients"),
    ({"explain": "attention", "patients": [{"id": str(i), "text": ""} for i in range(9)]}, {}, "explain",
     "max_explained"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "own", "param", "words"), HOSTILE, ids=lambda value: str(value)[:40])
def test_hostile_requests_are_refused_by_field(client: TestClient, fields, own, param: str, words: str) -> None:
    body = notes_request(TEXT)
    body["patients"][0] |= own
    error = ask(client, {**body, **fields}, status=404 if fields.get("model") == "other" else 400)
    assert (error["param"], words in error["message"]) == (param, True), error["message"]
    assert TEXT not in error["message"]


def test_other_hostile_bodies_are_refused(client: TestClient) -> None:
    whole = json.dumps(notes_request("x"))
    for content, words in [
        (whole.replace('"x"', '"\\ud800"').encode(), "patients holds half a surrogate pair"),
        (whole.replace('"x"', '"x", "text": "y"').encode(), "text is given twice"),
        (whole.replace('"x"', "NaN").encode(), "NaN is no number in JSON"),
        (whole.replace('"x"', '"a\x01b"').encode(), "the body is not JSON"),
        (whole.replace('"x"', '"\xe4"').encode("latin-1"), "it is not UTF-8"),
        (whole[:-1].encode(), "the body is not JSON"),
        (json.dumps([whole]).encode(), "must be a JSON object"),
        (whole.replace('"x"', "[" * 2000 + "]" * 2000).encode(), "levels of lists and objects"),
    ]:
        answer = client.post("/v1/predict", content=content, headers={"content-type": "application/json"})
        assert (answer.status_code, words in answer.text) == (400, True), answer.text
    assert "stand in its body" in ask(client, notes_request("x"), status=400, params={"explain": "none"})["message"]
    huge = client.post("/v1/predict", json=notes_request("a" * (1 << 20)))
    assert huge.status_code == 413


def test_the_longest_text_is_read_and_odd_characters_are_no_words(client: TestClient) -> None:
    odd = "\u202erash\u200b \ufeff\U0001f9a0 " + "e\u0301" * 9 + "\r\n\f\t" + "_" * 40
    longest = ("penicillin rash fine and " * 3000)[:MAX_CHARACTERS]
    found, other = ask(client, notes_request(longest, odd, explain="gradients"))["patients"]
    assert (found["text"]["characters"], found["text"]["cut"], found["status"]) == (MAX_CHARACTERS, True, "ok")
    assert [(word["start"], word["end"]) for word in other["words"]] == spans(odd)[:24]


def test_replies_and_cards_are_as_described(client: TestClient, both: TestClient) -> None:
    for each, request in ((client, notes_request(TEXT, "", explain="gradients")), (both, notes_request(TEXT))):
        document = each.get("/openapi.json").json()

        def check(value: Any, name: str, known: dict[str, Any] = document["components"]) -> None:
            schema = {"$ref": f"#/components/schemas/{name}", "components": known}
            jsonschema.Draft202012Validator(schema).validate(value)

        described = document["paths"]["/v1/predict"]["post"]
        names = [one["$ref"] for one in described["requestBody"]["content"]["application/json"]["schema"]["anyOf"]]
        assert names[1].endswith("/NotesRequest")
        check(request, "NotesRequest")
        check(ask(each, request), "LabelList")
        check(each.get(f"/v1/models/{NAME}").json(), "NoteCard")
        check(each.get("/v1/models").json(), "ModelList")


def test_limits_and_logs(run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What takes too long ends, also within an explanation; no log and no metric holds a word of a text."""
    secret = f"rash {SECRET} {'penicillin fine and well am i today ' * 2}"

    def fails(*_: Any) -> None:
        raise RuntimeError(SECRET)

    with clinical_client(run) as client, caplog.at_level(logging.DEBUG):
        ask(client, notes_request(secret, explain="gradients"))
        ask(client, notes_request(f"{secret}\x00"), status=400)
        monkeypatch.setattr(reader_module, "inputs_of", fails)
        error = ask(client, notes_request(secret), status=500)
        monkeypatch.undo()
        assert error["code"] == "request_failed"
        assert "a prediction failed" in caplog.text
        ticks = iter(range(0, 10**6, 7))  # the deadline of 60 s passes while gradients are computed
        monkeypatch.setattr("serve.workplace.time.perf_counter", lambda: float(next(ticks)))
        error = ask(client, notes_request(secret, explain="gradients"), status=503)
        assert "predict_timeout_s=60" in error["message"]
        monkeypatch.undo()
        assert SECRET not in caplog.text
        assert SECRET not in client.get("/metrics").text
