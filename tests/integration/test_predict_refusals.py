"""What POST /v1/predict refuses, how it says so, and within what limits it works."""

import copy
import json
import logging
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from attnzoo.clinical.cohort import Cohort
from attnzoo.clinical.variables import PMDATA
from serve import workplace
from serve.clinical import intake as intake_module
from serve.clinical.loading import check_clinical, clinical_sources
from serve.clinical.predictor import Predictor
from serve.config import ServeConfig
from tests.helpers.clinical_models import NAMES, ask, clinical_client, export, icu_cohort, request_of, small_trained
from tests.helpers.engines import SECRET


@pytest.fixture(scope="module")
def cohort() -> Cohort:
    return icu_cohort()


@pytest.fixture(scope="module")
def checkpoint(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("refusals"), small_trained(cohort, judged=0))


@pytest.fixture(scope="module")
def client(checkpoint: Path) -> Iterator[TestClient]:
    with clinical_client(checkpoint) as client:
        yield client


MISTAKES: list[tuple[dict[str, Any], str, str]] = [
    ({"model": "other"}, "model", "does not exist; this server has 'tiny'"),
    ({"patients": []}, "patients", "at least 1 item"),
    ({"patients": {}}, "patients", "must be a valid list"),
    ({"patents": []}, "patents", "did you mean 'patients'"),
    ({"explain": "shap"}, "explain", "explain=\"shap\" must be 'none', 'attention' or 'gradients'"),
    ({"cutoff_hour": 13}, "cutoff_hour", "cutoff_hour=13 must be from 1 to 12"),
    ({"cutoff_hour": 0}, "cutoff_hour", "from 1 to 12"),
    ({"cutoff_hour": 2.5}, "cutoff_hour", "cutoff_hour=2.5 must be a valid integer"),
    ({"hourly": "yes"}, "hourly", 'hourly="yes" must be a valid boolean'),
]
WRONG_PATIENTS: list[tuple[dict[str, Any], str, str]] = [
    ({"id": ""}, "id", "at least 1 character"),
    ({"age": 60}, "age", "did you mean 'age_years'"),
    ({"sex": "m"}, "sex", "must be 'female', 'male' or 'unknown'"),
    ({"icu_type": 3}, "icu_type", "must be 'coronary care'"),
    ({"admitted": "2026-03-01T08:00:00"}, "admitted", "is no time with its offset from UTC; write it as in"),
    ({"admitted": "9999-12-31T23:59:59+00:00"}, "admitted", "is no time"),
    ({"weight_kg": "81"}, "weight_kg", 'weight_kg="81" must be a valid number'),
    ({"measurements": None}, "measurements", "must be a valid list"),
]
WRONG_VALUES: list[tuple[dict[str, Any], str, str]] = [
    ({"unit": None}, "unit", "must be a valid string"),
    ({"hour": None}, "hour", "has neither hour nor time"),
    ({"time": "2026-03-01T08:00:00Z"}, "hour", "has both hour and time"),
    ({"hour": None, "time": "2026-03-01T08:00:00Z"}, None, "needs patients[0].admitted"),
    ({"value": True}, "value", "value=true must be a valid number"),
    ({"value": 1e31}, "value", "must be less than or equal to 1000000000"),
    ({"varable": "HR"}, "varable", "did you mean 'variable'"),
]


@pytest.mark.parametrize(
    ("where", "change", "field", "words"),
    [("", *row) for row in MISTAKES]
    + [("patients[0]", *row) for row in WRONG_PATIENTS]
    + [("patients[0].measurements[1]", *row) for row in WRONG_VALUES],
    ids=str,
)
def test_mistakes_are_named_with_the_way_out(client, cohort, where, change, field, words):
    body = request_of(cohort, [0])
    patient = body["patients"][0]
    {"": body, "patients[0]": patient}.get(where, patient["measurements"][1]).update(change)
    error = ask(client, body, status=404 if field == "model" else 400)
    assert words in error["message"]
    expected = "patients[0].admitted" if field is None else f"{where}.{field}".removeprefix(".")
    assert error["param"] == expected


def test_requests_of_another_shape_are_refused(client, cohort):
    body = request_of(cohort, [0])
    for content, words in [
        (b'{"model": NaN}', "NaN is no number in JSON"),
        (b"[1]", "must be a JSON object with the fields model and patients"),
        (b'{"resourceType": "Bundle"}', "send it as content-type: application/fhir+json"),
        (b"{" * 5000, "not JSON"),
        (b'{"model": "tiny"}', "patients is missing"),
    ]:
        answer = client.post("/v1/predict", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]
    assert "stand in its body" in ask(client, body, status=400, params={"explain": "none"})["message"]
    twice = {**body, "patients": body["patients"] * 2}
    assert ask(client, twice, status=400)["param"] == "patients[1].id"
    two = request_of(cohort, [0, 1])
    assert "stream takes one patient; 2 are given" in ask(client, {**two, "stream": True}, status=400)["message"]
    assert client.get("/v1/predict").status_code == 405
    for path, kind, status in [
        ("/v1/predict", "text/plain", 415), ("/v1/models", "application/fhir+json", 415),
        ("/v1/predict", "application/fhir+json", 400),
    ]:  # fmt: skip
        assert client.post(path, content=b"{}", headers={"content-type": kind}).status_code == status


JUNK = [None, True, -1, 1e300, 2**62, "", "x" * 2000, "\ud800", [], [[]], {}, {"": 0}, {"value": {}}]


def test_any_part_of_a_request_may_be_junk(client, cohort):
    """It ends in an answer or in a refusal, never in an error of the server."""
    draw, statuses = random.Random(3), set()
    whole = request_of(cohort, [1, 4], hourly=True)
    for one in whole["patients"]:
        one["measurements"] = one["measurements"][:6]
    for _ in range(250):
        body = copy.deepcopy(whole)
        node: Any = body
        while True:
            key = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if not isinstance(node[key], dict | list) or not node[key] or draw.random() < 0.2:
                break
            node = node[key]
        node[key] = draw.choice(JUNK)
        content = json.dumps(body).encode()
        answer = client.post("/v1/predict", content=content, headers={"content-type": "application/json"})
        assert answer.status_code in (200, 400, 404), (node, key)
        statuses.add(answer.status_code)
        if answer.status_code != 200:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert statuses >= {200, 400}


def test_limits(checkpoint, cohort, monkeypatch):
    monkeypatch.setenv("PREDICT_KEY", "k")
    own = {"max_patients": 2, "max_explained": 1, "max_predictions": 1, "api_key_env": "PREDICT_KEY"}
    with clinical_client(checkpoint, **own) as client:
        assert client.post("/v1/predict", json=request_of(cohort, [0])).status_code == 401
        client.headers["authorization"] = "Bearer k"
        assert client.post("/v1/predict", json={}, headers={"host": "evil.example"}).status_code == 403
        error = ask(client, request_of(cohort, [0, 1, 2]), status=400)
        assert (error["param"], error["code"]) == ("patients", "too_many_patients")
        error = ask(client, request_of(cohort, [0, 1], explain="gradients"), status=400)
        assert (error["param"], "max_explained" in error["message"]) == ("explain", True)
        clinic = client.app.state.clinic
        with clinic.admitted():
            error = ask(client, request_of(cohort, [0]), status=429)
            assert "max_predictions" in error["message"]
        ask(client, request_of(cohort, [0]))
        monkeypatch.setattr(workplace.time, "perf_counter", iter(range(0, 100000, 1000)).__next__)
        error = ask(client, request_of(cohort, [0]), status=503)
        assert "predict_timeout_s=60" in error["message"]
        monkeypatch.undo()
        ask(client, request_of(cohort, [0]))
        clinic.draining = True
        assert ask(client, request_of(cohort, [0]), status=503)["code"] == "unavailable"
        assert client.get("/health").status_code == 503


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"checkpoint": "{clinical}", "clinical": "{clinical}"}, "both models are called 'tiny'; set clinical_name"),
        ({"checkpoint": "{clinical}", "clinical_name": "x"}, "clinical_name='x' has no effect"),
        ({"checkpoint": "{clinical}", "max_num_seqs": 4}, "max_num_seqs=4 has no effect: "),
        ({"checkpoint": "{clinical}", "attention": "read"}, "attention='read' has no effect"),
        ({"checkpoint": "none", "max_patients": 4}, "this server has no clinical model (setting clinical)"),
        ({"checkpoint": "none", "clinical": "nowhere"}, "clinical='nowhere' does not exist; train it first"),
        ({"checkpoint": "none", "clinical": "/"}, "clinical='/' holds no clinical model; give the run"),
        ({"checkpoint": "tiny", "clinical": "{clinical}"}, "both models are called 'tiny'; set clinical_name"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing(checkpoint, settings, words):
    given = {key: str(checkpoint.parent) if value == "{clinical}" else value for key, value in settings.items()}
    with pytest.raises(ValueError, match=re.escape(words)):
        clinical_sources(ServeConfig(**given))


def test_models_that_cannot_be_asked_for(cohort, tmp_path):
    """Steps of days, variables whose unit nobody knows, and damage."""
    for name, words in (("sleep_minutes", "steps of this model are days"), ("unheard", "'unheard' has no row")):
        other = replace(cohort, grid=replace(cohort.grid.take(np.arange(30)), variables=(name, *NAMES[1:])))
        if name == "sleep_minutes":
            grid = replace(other.grid, variables=tuple(PMDATA)[:5])
            other = replace(other, grid=grid)
        path = export(tmp_path / name, small_trained(other, judged=0))
        with pytest.raises(ValueError, match=words):
            Predictor.load(path, "x", 1)
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"):
        check_clinical(ServeConfig(checkpoint=str(path)))


def test_no_log_and_no_other_reply_holds_what_a_patient_told(checkpoint, cohort, monkeypatch, caplog):
    def fails(*_: Any) -> None:
        raise RuntimeError(SECRET)

    with clinical_client(checkpoint) as client, caplog.at_level(logging.DEBUG):
        monkeypatch.setattr(intake_module, "cohort_of", fails)
        body = request_of(cohort, [0])
        body["patients"][0]["id"] = SECRET
        error = ask(client, body, status=500)
        monkeypatch.undo()
        assert error["code"] == "request_failed"
        assert "a prediction failed" in caplog.text
        assert SECRET not in caplog.text
        ask(client, body)
        body["patients"][0]["age_years"] = SECRET
        ask(client, body, status=400)
        assert SECRET not in caplog.text
        assert SECRET not in client.get("/metrics").text
