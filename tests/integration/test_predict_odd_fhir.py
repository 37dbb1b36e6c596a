"""Odd requests for RiskAssessments: times within an hour, names that no reference can hold, what a client accepts."""

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from starlette.testclient import TestClient

from attnzoo.clinical.risk_assessment import read_risk_assessment
from tests.helpers.clinical_files import FHIR_START, fhir_bundle, fhir_observation, fhir_stays, fhir_time
from tests.helpers.clinical_models import MODEL, WINDOW, ask, clinical_client, export, icu_cohort, small_trained

FHIR = "application/fhir+json"
PULSE = fhir_observation("hr", 2, "8867-4", 92, "/min")
HEAT = fhir_observation("temp", 130, "8310-5", 100.4, "[degF]")
HOUR = timedelta(hours=1)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    checkpoint = export(tmp_path_factory.mktemp("odd"), small_trained(icu_cohort(), judged=0))
    with clinical_client(checkpoint) as client:
        yield client


def bundle(*observations: dict[str, Any], **encounter: Any) -> dict[str, Any]:
    """A patient, an encounter that goes on, and these observations. encounter: its other elements."""
    patient, stay = (one for one in fhir_stays() if one["id"] in ("p1", "e1"))
    stay = {**stay, "period": {"start": fhir_time(0)}, **encounter}
    return fhir_bundle([patient, {name: value for name, value in stay.items() if value is not None}, *observations])


def post(client: TestClient, content: Any, status: int = 200, accept: str = FHIR, **query: Any) -> Any:
    headers = {"content-type": FHIR, "accept": accept}
    answer = client.post("/v1/predict", json=content, params=query, headers=headers)
    assert answer.status_code == status, answer.text
    return answer.json() if status == 200 else answer.json()["error"]


def patient(**fields: Any) -> dict[str, Any]:
    """The body of a request for one patient."""
    pulse = {"variable": "HR", "hour": 0.5, "value": 90, "unit": "/min"}
    return {"model": MODEL, "patients": [{"id": "7", "measurements": [pulse], **fields}]}


@pytest.mark.parametrize(
    ("query", "minutes"),
    [
        ({"at": fhir_time(200)}, 200),
        ({"at": fhir_time(180)}, 180),
        ({"at": "2026-03-01T12:50:00+01:00"}, 200),
        ({"at": "2026-03-01T12:50:00", "tz": "Europe/Berlin"}, 200),
        ({"at": fhir_time(200), "cutoff_hour": 10}, 200),
        ({"at": fhir_time(200), "cutoff_hour": 2}, 120),
        ({"at": fhir_time(6000)}, 60 * WINDOW),  # the model sees no more
        ({"cutoff_hour": 2}, 120),
    ],
)
def test_an_assessment_is_of_the_time_that_was_asked_for(client, query, minutes):
    expected = FHIR_START + timedelta(minutes=minutes)
    assert read_risk_assessment(post(client, bundle(PULSE, HEAT), **query)).occurrence == expected
    (told,) = post(client, bundle(PULSE, HEAT), accept="application/json", **query)["patients"]
    assert datetime.fromisoformat(told["cutoff_time"]) == expected
    assert told["cutoff_hour"] == min(-(-(minutes + ("at" in query and minutes in (180, 200))) // 60), WINDOW)


def test_facts_of_a_patient_that_are_not_used_are_told(client):
    """They change the number as values do, so that losing them is no secret."""
    content = bundle(PULSE, fhir_observation("height", 3, "8302-2", 170, "parsec"))
    content["entry"][0]["resource"] |= {"birthDate": "1800", "gender": "M"}
    told = post(client, content, accept="application/json")["bundle"]
    assert told["left_out"] == {
        "age at admission that is impossible": 1,
        "patients whose gender is no code of FHIR": 1,
    }
    assert told["unknown_units"] == {"height at admission": 1}


def test_a_time_without_its_zone_is_named(client):
    error = post(client, bundle(PULSE), status=400, at="2026-03-01T12:50:00")
    assert (error["param"], "tz=" in error["message"]) == ("at", True)


@pytest.mark.parametrize("name", ["a b", "Patient/7", " ", "a\nb", "ü", "x" * 65])
def test_a_patient_whose_id_no_reference_can_hold(client, name):
    asked = patient(id=name, admitted="2026-03-01T08:00:00Z")
    assert ask(client, asked)["patients"][0]["id"] == name
    error = ask(client, asked, status=400, headers={"accept": FHIR})
    assert error["param"] == "patients[0].id"
    assert "letters, digits" in error["message"]


def test_references_of_a_bundle_are_references(client):
    """What has no id has no reference; an id that FHIR does not allow is refused."""
    whole = post(client, bundle({**PULSE, "encounter": None}, id=None))
    assert (whole["subject"], "encounter" in whole) == ({"reference": "Patient/p1"}, False)
    named = fhir_bundle([*fhir_stays()[:1], PULSE])
    named["entry"].append({"fullUrl": "urn:uuid:7", "resource": bundle(id=None)["entry"][1]["resource"]})
    named["entry"][1]["resource"] = {**PULSE, "encounter": {"reference": "urn:uuid:7"}}
    assert post(client, named)["encounter"] == {"reference": "urn:uuid:7"}
    stray = {**PULSE, "encounter": {"reference": "Encounter/e 1"}}
    for content, shown in (
        (bundle(stray, id="e 1"), "Encounter/e 1"),
        (bundle(PULSE, subject={"reference": "Patient/p 1"}), "Patient/p 1"),
        (bundle({**PULSE, "id": "h r"}), "Observation/h r"),
    ):
        for one in content["entry"]:
            one["resource"] = {**one["resource"], "subject": content["entry"][1]["resource"]["subject"]}
        error = post(client, content, status=400)
        assert (error["param"], shown in error["message"]) == ("entry", True), error
        assert post(client, content, accept="application/json")["patients"][0]["measurements"]["used"] == 1


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ([f"{FHIR};q=0, application/json"], "application/json"),
        ([f"{FHIR};q=0.1, application/json;q=0.9"], "application/json"),
        ([f"{FHIR};q=0.9, application/json;q=0.1"], FHIR),
        ([f"{FHIR}, application/json"], FHIR),
        ([f"{FHIR}; fhirVersion=4.0"], FHIR),
        (["application/json;q=0.5", FHIR], FHIR),
        ([f"*/*, {FHIR};q=0.5"], FHIR),  # the wildcard names nothing
        ([",,;;"], "application/json"),
    ],
)
def test_what_a_client_accepts(client, accept, kind):
    headers = [("accept", one) for one in accept]
    asked = patient(admitted="2026-03-01T08:00:00Z")
    answer = client.post("/v1/predict", json=asked, headers=headers)
    assert (answer.status_code, answer.headers["content-type"]) == (200, kind)


@pytest.mark.parametrize(
    ("accept", "shown"),
    [
        ("application/fhir+xml", "application/fhir+xml is not written here"),
        ("text/xml;q=0.8, application/fhir+xml", "text/xml is not"),
        (f"{FHIR};q=abc", "q='abc'"),
        (f"{FHIR};q=nan", "q='nan'"),
        (f"{FHIR};q=2", "q='2'"),
        (f"{FHIR};fhirVersion=5.0", "fhirVersion=5.0"),
    ],
)
def test_what_cannot_be_accepted_is_named(client, accept, shown):
    error = ask(client, patient(admitted="2026-03-01T08:00:00Z"), status=400, headers={"accept": accept})
    assert (error["param"], shown.lower() in error["message"].lower()) == ("accept", True)


def test_the_end_of_the_calendar(client):
    error = post(client, bundle(PULSE, period={"start": "9999-12-31T23:00:00Z"}), status=400)
    assert (error["param"], "end of the calendar" in error["message"]) == ("entry", True)
    for offset in ("+23:59", "-14:01", "+01:00:30"):
        error = ask(client, patient(admitted=f"2026-03-01T08:00:00{offset}"), status=400)
        assert (error["param"], "offset from UTC" in error["message"]) == ("patients[0].admitted", True)


def test_a_value_that_is_refused_moves_no_cut_off(client):
    late = {"variable": "HR", "hour": 9, "value": -5, "unit": "/min"}
    whole = patient()
    plain = ask(client, whole)["patients"][0]
    whole["patients"][0]["measurements"].append(late)
    moved = ask(client, whole)["patients"][0]
    assert moved["measurements"]["rejected"] == {"after the cut-off": 1}
    assert moved["cutoff_hour"] == plain["cutoff_hour"] == 1
    assert moved["probability"] == plain["probability"]
    odd = fhir_observation("odd", 500, "8867-4", -5, "/min")
    assert post(client, bundle(PULSE, odd), accept="application/json")["patients"][0]["cutoff_hour"] == 1


def test_what_a_modifier_may_turn_round_is_left_out(client):
    turned = {"modifierExtension": [{"url": "http://example.org/not", "valueBoolean": True}]}
    told = post(client, bundle(PULSE, {**HEAT, **turned}), accept="application/json")
    assert told["bundle"]["left_out"] == {"observations with a modifierExtension": 1}
    assert told["patients"][0]["measurements"]["used"] == 1
    error = post(client, bundle(PULSE, **turned), status=400)
    assert "encounters with a modifierExtension" in error["message"]
