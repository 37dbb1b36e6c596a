"""POST /v1/predict against the model itself: the same numbers in every form of asking, and refusals that help."""

import itertools
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from starlette.testclient import TestClient

from attnzoo.clinical.cohort import Cohort
from attnzoo.clinical.formats import load_cohort
from attnzoo.clinical.outcome import Outcome
from attnzoo.clinical.trained import TrainedModel, load_trained
from attnzoo.clinical.variables import PHYSIONET2012, STATICS
from serve.clinical.intake import cut
from tests.helpers.clinical_data import shared_data
from tests.helpers.clinical_models import (
    MODEL,
    NAMES,
    WINDOW,
    ask,
    clinical_client,
    export,
    icu_cohort,
    patient_of,
    request_of,
    small_trained,
)
from tests.helpers.http_server import events

CLOSE = {"rel": 0, "abs": 1e-6}


@pytest.fixture(scope="module")
def cohort() -> Cohort:
    return icu_cohort()


@pytest.fixture(scope="module")
def checkpoint(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("predict"), small_trained(cohort)).parent


@pytest.fixture(scope="module")
def trained(checkpoint: Path) -> TrainedModel:
    return load_trained(checkpoint)


@pytest.fixture(scope="module")
def client(checkpoint: Path) -> Iterator[TestClient]:
    with clinical_client(checkpoint) as client:
        yield client


def until(cohort: Cohort, hours: int) -> Cohort:
    return cut(cohort, np.full(len(cohort), hours))


def test_predictions_are_those_of_the_model(client, cohort, trained):
    """Stays of 12 and of 5 hours in one request, in any order, and each alone; one has no measurement."""
    rows = [2, 1, 0, 3, 7]
    expected = dict(zip(rows, trained.predict(cohort, np.array(rows)), strict=True))
    together = ask(client, request_of(cohort, rows))["patients"]
    assert [one["id"] for one in together] == [f"stay {row}" for row in rows]
    assert len({round(p, 3) for p in expected.values()}) == len(rows), "the stays are too alike for this test"
    for row, one in zip(rows, together, strict=True):
        (alone,) = ask(client, request_of(cohort, [row]))["patients"]
        assert alone["input_digest"] == one["input_digest"]
        if row == 3:
            assert (one["status"], one["probability"], one["low"]) == ("not_enough_data", None, None)
            assert one["reasons"] == ["no value of the model's variables is known"]
            continue
        assert one["status"] == "ok"
        assert one["probability"] == pytest.approx(expected[row], **CLOSE)
        assert alone["probability"] == pytest.approx(expected[row], **CLOSE)
        assert 0 <= one["low"] < one["probability"] < one["high"] <= 1
        assert one["coverage"]["measured"] == pytest.approx(
            np.count_nonzero(cohort.grid.counts_NTV[row]) / (len(NAMES) * cohort.grid.hours_N[row])
        )


def test_the_risk_of_an_hour_is_that_of_the_stay_cut_there(client, cohort, trained):
    rows = [0, 1, 4]
    told = ask(client, request_of(cohort, rows, hourly=True))["patients"]
    assert [len(one["by_hour"]) for one in told] == [12, 5, 12]
    for hour in range(1, WINDOW + 1):
        expected = trained.predict(until(cohort, hour), np.array(rows))
        for row, one in enumerate(told):
            if hour <= len(one["by_hour"]):
                entry = one["by_hour"][hour - 1]
                assert entry["hour"] == hour
                assert entry["probability"] == pytest.approx(expected[row], **CLOSE)
    whole = {"patients": [patient_of(cohort, 0) | {"cutoff_hour": None}], "model": MODEL}
    early = ask(client, {**whole, "cutoff_hour": 7})["patients"][0]
    assert early["probability"] == pytest.approx(told[0]["by_hour"][6]["probability"], **CLOSE)
    assert early["measurements"]["rejected"]["after the cut-off"] > 0
    late = ask(client, whole)["patients"][0]
    assert late["cutoff_hour"] == 1 + max(int(one["hour"]) for one in whole["patients"][0]["measurements"])


def test_a_stream_tells_the_same_hours_and_then_everything(client, cohort):
    body = request_of(cohort, [0], hourly=True, explain="gradients")
    whole = ask(client, body)
    answer = client.post("/v1/predict", json={**body, "hourly": False, "stream": True})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    *hours, last = events(answer.text)
    for given, entry in zip(hours, whole["patients"][0]["by_hour"], strict=True):
        assert given.pop("object") == "prediction.hour"
        assert given == pytest.approx(entry, abs=1e-6)
    assert last.keys() == whole.keys()
    assert last["patients"][0]["probability"] == pytest.approx(whole["patients"][0]["probability"], **CLOSE)
    for part in ("cells", "measurements", "reasons", "input_digest"):
        assert last["patients"][0][part] == whole["patients"][0][part]
    assert [one["hour"] for one in last["patients"][0]["by_hour"]] == list(range(1, WINDOW + 1))


@pytest.mark.parametrize(
    ("name", "value", "unit", "other", "as_unit"),
    [
        ("Temp", 38, "Cel", 100.4, "[degF]"),
        ("Temp", 38, "Cel", 311.15, "K"),
        ("Glucose", 180.16, "mg/dL", 10, "mmol/L"),
        ("Lactate", 2, "mmol/L", 18.016, "mg/dL"),
        ("FiO2", 50, "%", 0.5, "1"),
        ("FiO2", 50, "%", 0.5, "%"),
        ("FiO2", 21, "%", 0.21, "fraction"),
        ("HR", 90, "/min", 90, "{beats}/min"),
    ],
)
def test_a_value_in_another_unit_is_the_same_value(client, cohort, name, value, unit, other, as_unit):
    answers = []
    for one, of in ((value, unit), (other, as_unit), (value, "furlong"), (value * 1.3, unit)):
        body = request_of(cohort, [0])
        body["patients"][0]["measurements"].append({"variable": name, "hour": 11.9, "value": one, "unit": of})
        answers.append(ask(client, body)["patients"][0])
    first, second, unknown, different = answers
    assert second["probability"] == pytest.approx(first["probability"], **CLOSE)
    assert abs(different["probability"] - first["probability"]) > 1e-5
    assert unknown["measurements"]["rejected"] == {"unknown unit": 1}
    assert unknown["input_digest"] == ask(client, request_of(cohort, [0]))["patients"][0]["input_digest"]
    assert "furlong" in unknown["measurements"]["examples"][0]["words"]


def test_every_value_is_accounted_for(client):
    """Times with offsets, values that are clipped, impossible, outside the stay, of no variable or of no unit."""
    given = [
        ("HR", {"hour": 0.25}, 92, "/min"),
        ("HR", {"hour": 0.5}, 260, "/min"),  # counts as 250
        ("HR", {"hour": 0.75}, 9000, "/min"),  # impossible: the one before stands
        ("Temp", {"time": "2026-03-01T09:10:00+02:00"}, 100.4, "[degF]"),  # minute 70 in another zone
        ("Lactate", {"hour": 2.5}, -5, "mmol/L"),
        ("Glucose", {"hour": 3}, 6.2, "furlong"),
        ("Sodium", {"hour": 3}, 140, "mmol/L"),
        ("HR", {"hour": -0.1}, 80, "/min"),
        ("HR", {"hour": 6}, 81, "/min"),
    ]
    measurements = [{"variable": v, **when, "value": x, "unit": u} for v, when, x, u in given]
    patient = {
        "id": "p", "admitted": "2026-03-01T06:00:00+00:00", "cutoff_hour": 6, "age_years": 150, "sex": "unknown",
        "measurements": measurements,
    }  # fmt: skip
    patient["weight_kg"] = 20
    body = {"model": MODEL, "patients": [patient], "explain": "gradients"}
    (told,) = ask(client, body)["patients"]
    assert told["cutoff_time"] == "2026-03-01T12:00:00+00:00"
    account = told["measurements"]
    assert account["rejected"] == {
        "impossible value": 3, "unknown unit": 1, "unknown variable": 1, "before admission": 1, "after the cut-off": 1
    }  # fmt: skip
    assert (account["given"], account["used"], account["clipped"]) == (9, 3, 2)
    assert account["by_variable"]["HR"] == {
        "used": 2, "clipped": 1, "impossible value": 1, "before admission": 1, "after the cut-off": 1
    }  # fmt: skip
    assert account["by_variable"]["age_years"] == {"impossible value": 1}
    assert account["by_variable"]["weight_kg"] == {"clipped": 1}
    fields = {one["field"]: one["words"] for one in account["examples"]}
    assert "did you mean" in fields["patients[0].measurements[6]"] or "known:" in fields["patients[0].measurements[6]"]
    assert fields["patients[0].measurements[4]"] == "-5 mmol/L is outside of 0 to 60"
    cells = {(one["hour"], one["variable"]): one for one in told["cells"]}
    assert cells.keys() == {(0, "HR"), (1, "Temp"), (2, "Lactate")}
    heart, cold, acid = (cells[key] for key in sorted(cells))
    assert (heart["value"], heart["count"], heart["flag"], heart["given"]["value"]) == (250, 2, "clipped", 260)
    assert (cold["value"], cold["given"]["value"], cold["flag"]) == (pytest.approx(38), 100.4, None)
    assert (acid["measured"], acid["value"], acid["flag"], acid["count"]) == (False, None, "implausible", 0)
    used = [one for one in measurements if one["variable"] in ("HR", "Temp") and one.get("hour") in (0.25, 0.5, None)]
    plain = {**patient, "measurements": used, "age_years": None, "weight_kg": 25}
    (same,) = ask(client, {**body, "patients": [plain], "explain": "none"})["patients"]
    assert (same["probability"], same["input_digest"]) == (told["probability"], told["input_digest"])
    assert same["cells"] == same["explanations"] == []


def test_explanations_are_of_the_measured_cells_and_add_up(client, cohort):
    body = request_of(cohort, [0, 1])
    measured = {(hour, NAMES[i]) for hour, i in np.argwhere(cohort.grid.counts_NTV[1]).tolist()}
    told = ask(client, {**body, "explain": "gradients"})
    assert told["base_rate"]["probability"] == pytest.approx(0.4)
    one = told["patients"][1]["explanations"][0]
    assert {(cell["hour"], cell["variable"]) for cell in one["cells"]} == measured
    total = sum(cell["contribution"] for cell in one["cells"])
    distance = one["logit"] - one["logit_without_measurements"]
    assert total == pytest.approx(distance, abs=0.05 * max(1, abs(distance)))
    assert one["faithful"] in (True, False)
    assert "integrated gradients" in one["faithfulness"]
    sums = {found["variable"]: found["amount"] for found in one["findings"]}
    for name, amount in sums.items():
        own = sum(cell["contribution"] for cell in one["cells"] if cell["variable"] == name)
        assert amount == pytest.approx(own, abs=1e-5)
    seen = ask(client, {**body, "explain": "attention"})["patients"][1]["explanations"][0]
    assert sum(cell["contribution"] for cell in seen["cells"]) == pytest.approx(1, abs=1e-5)
    assert (seen["signed"], seen["unit"], seen["logit"]) == (False, "share", None)


def test_replies_are_as_described(client, cohort):
    document = client.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/predict", "/v1/models", "/v1/models/{model_id}", "/health", "/ready", "/version", "/metrics"
    }  # fmt: skip
    described = document["paths"]["/v1/predict"]["post"]

    def check(value: Any, schema: dict[str, Any]) -> None:
        jsonschema.Draft202012Validator({**schema, "components": document["components"]}).validate(value)

    body = request_of(cohort, [0, 3], hourly=True, explain="gradients")
    check(body, described["requestBody"]["content"]["application/json"]["schema"])
    content = described["responses"]["200"]["content"]
    check(ask(client, body), content["application/json"]["schema"])
    stream = client.post("/v1/predict", json=request_of(cohort, [0], stream=True))
    *hours, last = events(stream.text)
    check(hours[0], content["text/event-stream"]["schema"]["x-event"])
    check(last, content["application/json"]["schema"])
    check(client.get("/v1/models").json(), {"$ref": "#/components/schemas/ModelList"})
    card = client.get(f"/v1/models/{MODEL}").json()
    check(card, {"$ref": "#/components/schemas/ClinicalCard"})
    assert (card["kind"], card["window_hours"], card["explains"]) == (
        "clinical",
        12,
        ["none", "gradients", "attention"],
    )
    assert card["statics"] == ["age_years", "sex", "height_cm", "weight_kg", "icu_type"]
    assert "mmol/l" in next(one for one in card["variables"] if one["name"] == "Glucose")["units"]
    assert client.get("/v1/models/other").status_code == 404


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome(label="mortality", hourly=True),
        Outcome(label="los", edges=(24.0, 72.0), centers=(10.0, 40.0, 100.0)),
        Outcome(label="los", edges=(24.0, 72.0), head="linear", hourly=True, centers=(10.0, 40.0, 100.0)),
    ],
    ids=["hourly", "ordinal", "hourly buckets"],
)
def test_other_outcomes(outcome, cohort, tmp_path):
    """Predictions of every hour, and buckets: told as they are, explained, and without an interval that nobody has."""
    path = export(tmp_path, small_trained(cohort, outcome, judged=0))
    found = load_trained(path).predict(cohort, np.array([0, 1]))
    with clinical_client(path) as client:
        whole = ask(client, request_of(cohort, [0, 1], hourly=True))
        assert (whole["interval"] is None) == bool(outcome.edges) == (whole["interval_reason"] is not None)
        for row, hours in ((0, 12), (1, 5)):
            told = whole["patients"][row]
            last = found[row, hours - 1] if outcome.hourly else found[row]
            for numbers in (told, told["by_hour"][-1]):
                if outcome.edges:
                    assert [one["to"] for one in numbers["buckets"]] == [24, 72, None]
                    assert [one["probability"] for one in numbers["buckets"]] == pytest.approx(list(last), abs=1e-6)
                else:
                    assert numbers["probability"] == pytest.approx(last, **CLOSE)
        (told,) = ask(client, request_of(cohort, [1], explain="gradients"))["patients"]
        one = told["explanations"][0]
        total, within = one["logit"] - one["logit_without_measurements"], sum(c["contribution"] for c in one["cells"])
        assert within == pytest.approx(total, abs=0.05 * max(1, abs(total)))
        assert one["faithful"] is None
        if outcome.hourly:
            error = ask(client, request_of(cohort, [0], explain="attention"), status=400)
            assert error["param"] == "explain"
        if outcome.edges:
            patient = patient_of(cohort, 0, admitted="2026-03-01T08:00:00Z")
            fhir = {"accept": "application/fhir+json"}
            error = ask(client, {"model": MODEL, "patients": [patient]}, status=400, headers=fhir)
            assert "accept application/json" in error["message"]


def test_real_stays_as_their_files_tell_them(tmp_path):
    """Every line of a file of PhysioNet 2012 becomes a value of the request: the grid and the risk are the loader's."""
    (tmp_path / "set-a").mkdir()
    with tarfile.open(shared_data("physionet2012/set-a.tar.gz")) as archive:
        for member in itertools.islice((one for one in archive if one.name.endswith(".txt")), 12):
            (tmp_path / "set-a" / Path(member.name).name).write_bytes(archive.extractfile(member).read())
    nothing = ["Time,Parameter,Value", "00:00,RecordID,999999", "00:00,Age,70", "00:00,Gender,-1", "00:00,Height,-1"]
    (tmp_path / "set-a" / "999999.txt").write_text("\n".join([*nothing, "00:00,ICUType,3", "00:00,Weight,-1", ""]))
    cohort = load_cohort("physionet2012", tmp_path / "set-a")
    trained = small_trained(cohort, chunks=4, chunk_hours=12, judged=0, labelled=False)
    expected = trained.predict(cohort)
    patients = [_patient_of_file(tmp_path / "set-a" / f"{stay}.txt") for stay in cohort.stay_ids]
    with clinical_client(export(tmp_path, trained)) as client:
        told = ask(client, {"model": MODEL, "patients": patients, "cutoff_hour": 48, "explain": "none"})["patients"]
    assert len(set(np.round(expected, 4))) > 8
    for row, one in enumerate(told):
        assert one["measurements"]["used"] == cohort.grid.counts_NTV[row].sum()
        if one["coverage"]["measured"] < trained.statistics.least_coverage:
            assert (one["status"], one["probability"]) == ("not_enough_data", None)
        else:
            assert one["probability"] == pytest.approx(expected[row], **CLOSE)
    assert told[-1]["reasons"] == ["no value of the model's variables is known"]
    assert sum(one["status"] == "ok" for one in told) > 8


def _patient_of_file(path: Path) -> dict[str, Any]:
    codes = {"Gender": ("sex", {0: "female", 1: "male"}), "ICUType": ("icu_type", dict(STATICS["icu_type"].categories))}
    facts = {"Age": "age_years", "Height": "height_cm", "Weight": "weight_kg"}
    patient: dict[str, Any] = {"id": path.stem, "measurements": []}
    for line in path.read_text().splitlines()[2:]:  # after the header and the number of the record
        time, name, text = line.split(",")
        value, minutes = float(text), 60 * int(time[:2]) + int(time[3:])
        if value == -1:
            continue  # the data set's word for unknown
        if name in codes:
            field, words = codes[name]
            patient[field] = words[int(value)]
        elif name in facts and time == "00:00":
            patient.setdefault(facts[name], value)
        if name in PHYSIONET2012:
            unit = "1" if name == "FiO2" else PHYSIONET2012[name].unit
            patient["measurements"].append({"variable": name, "hour": minutes / 60, "value": value, "unit": unit})
    return patient


def test_nothing_is_known_from_the_cut_on(cohort):
    """Not even for the guard, which counts cells."""
    hours_N = np.arange(len(cohort)) % WINDOW + 1
    found = cut(cohort, hours_N).grid
    later_NT = np.arange(found.hours) >= hours_N[:, None]
    assert not found.counts_NTV[later_NT].any()
    assert np.isnan(found.values_NTV[later_NT]).all()
    own_N = np.minimum(hours_N, cohort.grid.hours_N)
    np.testing.assert_array_equal(found.hours_N, own_N)
    np.testing.assert_array_equal(found.counts_NTV[~later_NT], cohort.grid.counts_NTV[~later_NT])
