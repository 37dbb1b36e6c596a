"""FHIR at both ends of POST /v1/predict: a bundle in, RiskAssessments out, and the same numbers as from JSON."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from attnzoo.clinical.formats.fhir import FhirOptions, read
from attnzoo.clinical.risk_assessment import read_risk_assessment
from attnzoo.clinical.trained import TrainedModel, load_trained
from tests.helpers.clinical_files import FHIR_START, fhir_bundle, fhir_observation, fhir_stays, fhir_time
from tests.helpers.clinical_models import MODEL, NAMES, WINDOW, clinical_client, export, icu_cohort, small_trained

FHIR = {"content-type": "application/fhir+json"}
RISK = {"accept": "application/fhir+json"}
VALUES = [
    ("hr", 2, "8867-4", 92, "/min"),
    ("temp", 130, "8310-5", 100.4, "[degF]"),
    ("glu", 300, "2345-7", 9, "mmol/L"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("fhir"), small_trained(icu_cohort(), judged=0))


@pytest.fixture(scope="module")
def trained(checkpoint: Path) -> TrainedModel:
    return load_trained(checkpoint)


@pytest.fixture(scope="module")
def client(checkpoint: Path) -> Iterator[TestClient]:
    with clinical_client(checkpoint) as client:
        yield client


def bundle(*more: dict[str, Any], stays: int = 1, ended: bool = True) -> dict[str, Any]:
    """One patient of an encounter of 60 hours, or two; the second has no observation of its own."""
    resources = [one for one in fhir_stays() if one["id"] in ("p1", "e1") or stays == 2]
    for one in resources:
        if not ended and one["resourceType"] == "Encounter":
            del one["period"]["end"]
    weight = fhir_observation("weight", 20, "29463-7", 150, "[lb_av]")
    return fhir_bundle([*resources, *(fhir_observation(*value) for value in VALUES), weight, *more])


def post(client: TestClient, content: Any, status: int = 200, accept: str = "*/*", **query: Any) -> Any:
    answer = client.post("/v1/predict", json=content, params=query, headers={**FHIR, "accept": accept})
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == (accept if status == 200 and accept != "*/*" else "application/json")
    return answer.json() if status == 200 else answer.json()["error"]


def test_a_bundle_gives_what_the_model_and_what_json_give(client, trained):
    found = read([("b", bundle())], FhirOptions(hours=WINDOW, variables=NAMES, names="physionet2012")).cohort
    told = post(client, bundle(), explain="gradients", hourly="true")
    (patient,) = told["patients"]
    assert (patient["id"], patient["cutoff_hour"], patient["status"]) == ("Encounter/e1", WINDOW, "ok")
    assert patient["probability"] == pytest.approx(trained.predict(found)[0], abs=1e-6)
    assert [(one["hour"], one["variable"], one["given"]["reference"]) for one in patient["cells"]] == [
        (0, "HR", "Observation/hr"), (2, "Temp", "Observation/temp"), (5, "Glucose", "Observation/glu")
    ]  # fmt: skip
    names = {"8867-4": "HR", "8310-5": "Temp", "2345-7": "Glucose"}
    given = [
        {"variable": names[code], "hour": minute / 60, "value": value, "unit": unit}
        for _, minute, code, value, unit in VALUES
    ]
    born = {"id": "1", "sex": "female", "age_years": 75, "weight_kg": 150 * 0.45359237, "cutoff_hour": WINDOW}
    same = client.post("/v1/predict", json={"model": MODEL, "patients": [{**born, "measurements": given}]}).json()
    assert same["patients"][0]["probability"] == pytest.approx(patient["probability"], abs=1e-6)
    assert same["patients"][0]["input_digest"] == patient["input_digest"]


def test_the_cut_off(client, trained):
    """By the query's hour or time; of an encounter that goes on the hour after the last measurement."""
    options = FhirOptions(hours=WINDOW, variables=NAMES, names="physionet2012", at=fhir_time(200))
    expected = trained.predict(read([("b", bundle())], options).cohort)[0]
    for query, hours in (({"at": fhir_time(200)}, 4), ({"cutoff_hour": 4}, 4), ({"cutoff_hour": 2}, 2)):
        (patient,) = post(client, bundle(), **query)["patients"]
        assert patient["cutoff_hour"] == hours
        assert (patient["probability"] == pytest.approx(expected, abs=1e-6)) == (hours == 4)
    (open_,) = post(client, bundle(ended=False))["patients"]
    assert open_["cutoff_hour"] == 6
    assert open_["measurements"]["used"] == 3


def test_risk_assessments(client):
    """One, or a bundle of them; without a number where there is not enough data."""
    probability = post(client, bundle(), cutoff_hour=6)["patients"][0]["probability"]
    risk = read_risk_assessment(post(client, bundle(), accept=RISK["accept"], cutoff_hour=6))
    assert risk.probability == pytest.approx(probability, abs=1e-9)
    assert (risk.subject, risk.encounter, risk.outcome) == ("Patient/p1", "Encounter/e1", "death in hospital")
    assert risk.occurrence == FHIR_START + timedelta(hours=6)
    assert risk.basis == ("Observation/hr", "Observation/weight", "Observation/temp", "Observation/glu")
    assert "research use only" in risk.method
    assert "95 % interval" in risk.rationale
    both = post(client, bundle(stays=2), accept=RISK["accept"])
    assert (both["resourceType"], both["type"]) == ("Bundle", "collection")
    first, second = (read_risk_assessment(one["resource"]) for one in both["entry"])
    assert first.probability is not None
    assert (second.subject, second.probability) == ("Patient/p2", None)
    assert "Not enough data" in second.rationale


def test_json_in_and_a_risk_assessment_out(client):
    patient = {"id": "7", "measurements": [{"variable": "HR", "hour": 1, "value": 90, "unit": "/min"}]}
    body = {"model": MODEL, "patients": [{**patient, "admitted": "2026-03-01T08:00:00+01:00"}]}
    risk = read_risk_assessment(client.post("/v1/predict", json=body, headers=RISK).json())
    assert (risk.subject, risk.occurrence.isoformat()) == ("Patient/7", "2026-03-01T10:00:00+01:00")
    answer = client.post("/v1/predict", json={**body, "patients": [patient]}, headers=RISK)
    assert answer.json()["error"]["param"] == "patients[0].admitted"
    answer = client.post("/v1/predict", json={**body, "explain": "gradients"}, headers=RISK)
    assert answer.json()["error"]["param"] == "explain"


def test_what_a_bundle_lacks_is_counted_or_named(client):
    odd = fhir_observation("odd", 5, "8867-4", 80, "furlong")
    dead = fhir_observation("dead", 5, "8867-4", 80, "/min", status="entered-in-error")
    far = fhir_observation("far", 5, "8867-4", 9999, "/min")
    told = post(client, bundle(odd, dead, far))
    assert told["bundle"]["unknown_units"] == {"HR": 1}
    assert told["bundle"]["left_out"]["observations of status 'entered-in-error'"] == 1
    assert told["patients"][0]["measurements"]["rejected"] == {"impossible value": 1}
    for version, status in (("4.0", 200), ("5.0", 415)):
        kind = {"content-type": f"application/fhir+json; fhirVersion={version}; charset=utf-8"}
        assert client.post("/v1/predict", json=bundle(), headers=kind).status_code == status
    naive = fhir_observation("naive", 5, "8867-4", 80, "/min", effectiveDateTime="2026-03-01T08:00:00")
    for content, query, param, words in [
        ({"resourceType": "Patient"}, {}, "resourceType", "no Bundle"),
        ({"resourceType": "Bundle"}, {}, "entry", "no Encounter"),
        (bundle(naive), {}, "entry", "tz"),
        (bundle(), {"at": "yesterday"}, "at", "at='yesterday' is no time"),
        (bundle(), {"cutoff_hour": "x"}, "cutoff_hour", 'cutoff_hour="x" must be a valid integer'),
        (bundle(), {"hours": 3}, "hours", "unknown field 'hours'; did you mean 'hourly'"),
        (bundle(), {"model": "other"}, "model", "does not exist"),
        (bundle(), {"explain": ["none", "none"]}, "explain", "given twice"),
        (bundle(stays=2), {"stream": "true"}, "stream", "one patient"),
    ]:
        error = post(client, content, status=404 if param == "model" else 400, **query)
        assert (error["param"], words in error["message"]) == (param, True), error
    assert np.isfinite(post(client, bundle(naive), tz="Europe/Berlin")["patients"][0]["probability"])
