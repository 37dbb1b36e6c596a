"""FHIR R4: bundles and NDJSON into the grid, what is left out and why, the time at which a result was there."""

import copy
import json
import math
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import numpy as np
import pytest

from attnzoo.clinical import loinc
from attnzoo.clinical.formats import load_cohort
from attnzoo.clinical.formats.fhir import FhirCohort, FhirOptions, read
from attnzoo.clinical.units import scale_of
from attnzoo.clinical.variables import MIMIC3, PHYSIONET2012, QUANTITIES, STATICS, YAIB
from tests.helpers.clinical_files import (
    LOINC,
    fhir_bundle,
    fhir_observation,
    fhir_quantity,
    fhir_stays,
    fhir_time,
    write_csv,
)

PULSE = ("8867-4", 80, "/min")
PANEL = {"coding": [{"system": LOINC, "code": "85354-9"}]}


def reading(*observations: dict[str, Any], **options: Any) -> FhirCohort:
    """Of the two stays and these observations."""
    return read([("request", fhir_bundle([*fhir_stays(), *observations]))], FhirOptions(**options))


def measured(read: FhirCohort, stay: int = 0) -> dict[tuple[str, int], float]:
    """The cells that hold a value: by variable and hour."""
    grid = read.cohort.grid
    found = zip(*np.nonzero(grid.counts_NTV[stay]), strict=True)
    return {(grid.variables[v], int(t)): float(grid.values_NTV[stay, t, v]) for t, v in found}


def left_out(read: FhirCohort) -> dict[str, int]:
    return {reason: count for reason, count in read.cohort.report.left_out.items() if count}


def test_bundle_by_hand():
    """A panel, two patients, statics, labels, an observation without an encounter, and the last value of an hour."""
    components = [fhir_quantity("8480-6", 120, "mm[Hg]"), fhir_quantity("8462-4", 80, "mm[Hg]")]
    found = reading(
        fhir_observation("late", 59.5, "8867-4", 90, "/min"),
        fhir_observation("early", 2, *PULSE),
        fhir_observation("panel", 61, "", 0, "", code=PANEL, valueQuantity=None, component=components),
        fhir_observation("gcs", 5, "", 0, "", code=fhir_quantity("9269-2", 0, "")["code"], valueQuantity=None)
        | {"valueInteger": 14},
        fhir_observation("weight", 50, "29463-7", 150, "[lb_av]"),
        fhir_observation("height", 70, "8302-2", 170, "cm"),
        fhir_observation("other", 130, *PULSE, encounter=None, subject={"reference": "http://x.org/fhir/Patient/p2"}),
        names="physionet2012",
        hours=4,
    )
    cohort = found.cohort
    assert (cohort.stay_ids, cohort.patient_ids) == (("Encounter/e1", "Encounter/e2"), ("Patient/p1", "Patient/p2"))
    weight = ("Weight", 0)
    expected = {("HR", 0): 90, ("NISysABP", 1): 120, ("NIDiasABP", 1): 80, ("GCS", 0): 14, weight: 68.0388555}
    assert measured(found) == {cell: pytest.approx(value) for cell, value in expected.items()}
    assert measured(found, 1) == {("HR", 2): 80}
    assert cohort.grid.counts_NTV.max() == 2
    assert cohort.statics == ("age", "sex", "height", "weight", "icu_type")
    np.testing.assert_allclose(cohort.statics_NS[0], [75, 0, np.nan, 68.0388555, np.nan], err_msg="height is too late")
    np.testing.assert_array_equal(cohort.statics_NS[1], [46, 1, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(cohort.label("mortality"), [1, 0])
    assert left_out(found) == {"values of height after the first hour": 1}
    assert found.basis("Encounter/e1") == tuple(
        f"Observation/{name}" for name in ("early", "gcs", "weight", "late", "panel")
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"id": "P1"}, "patients of no stay"),  # the encounter names p1
        ({"modifierExtension": [{"url": "http://x.org/not"}]}, "patients with a modifierExtension"),
    ],
)
def test_patients_whose_facts_no_stay_has_are_counted(changes, reason):
    content = fhir_bundle([*fhir_stays(), fhir_observation("a", 2, *PULSE)])
    content["entry"][0]["resource"] = content["entry"][0]["resource"] | changes
    found = read([("request", content)], FhirOptions())
    assert left_out(found) == {reason: 1}
    assert np.isnan(found.cohort.statics_NS[0, :2]).all()


def test_facts_that_are_not_used_are_counted():
    """A height of an unknown unit, one in metres that is told as centimetres, a date and a gender that are no codes."""
    patient, *others = fhir_stays()
    heights = [("parsec", 170), ("cm", 1.7), ("cm", 170)]
    given = [fhir_observation(f"h{i}", i, "8302-2", value, unit) for i, (unit, value) in enumerate(heights)]
    changed = {**patient, "birthDate": "03.02.1959", "gender": "M"}
    found = read([("request", fhir_bundle([changed, *others, *given]))], FhirOptions())
    assert left_out(found) == {
        "values of height that are impossible": 1,
        "patients whose birthDate cannot be read": 1,
        "patients whose gender is no code of FHIR": 1,
    }
    assert found.cohort.report.values["height at admission"]["unknown unit"] == 1
    for born, dropped in (("1800", 1), ("2030-01-01", 1), ("1951-03", 0)):
        changed = {**patient, "birthDate": born}
        found = read([("request", fhir_bundle([changed, *others]))], FhirOptions())
        assert (left_out(found), found.cohort.report.values["age at admission"]["dropped"]) == ({}, dropped)


@pytest.mark.parametrize(
    ("code", "value", "unit", "name", "expected"),
    [
        ("8310-5", 98.6, "[degF]", "temp", 37),
        ("8310-5", 37, "Cel", "temp", 37),
        ("2345-7", 5, "mmol/L", "glu", 90.08),
        ("14749-6", 5, "mmol/L", "glu", 90.08),
        ("14682-9", 88.42, "umol/L", "crea", 1),
        ("2703-7", 10, "kPa", "po2", 75.00617),
        ("3150-0", 0.4, "1", "fio2", 40),
        ("3150-0", 40, "%", "fio2", 40),
        ("59408-5", 0.97, "1", "o2sat", 97),
        ("777-3", 250, "10*9/L", "plt", 250),
        ("2744-1", 7.4, "[pH]", "ph", 7.4),
        ("6301-6", 1.1, "{INR}", "inr_pt", 1.1),
        ("2345-7", 5, "mmol", "glu", None),
        ("8310-5", 37, "mm[Hg]", "temp", None),
        ("8867-4", 80, "", "hr", None),
    ],
)
def test_units(code, value, unit, name, expected):
    """In the unit of the table by a factor of the substance; an unknown unit is left out and counted."""
    found = reading(fhir_observation("o", 1, code, value, unit))
    row = found.cohort.report.values[name]
    if expected is None:
        assert (measured(found), row["unknown unit"]) == ({}, 1)
    else:
        assert measured(found) == {(name, 0): pytest.approx(expected, rel=1e-5)}
        assert row == {"used": 1, "clipped": 0, "dropped": 0, "unknown unit": 0, "with a comparator": 0}


def test_units_and_comparators_without_a_code():
    """A spelling of the unit counts only where there is no code; a code of another system counts for nothing."""
    spelled = {"value": 80, "unit": "beats/min"}
    for quantity, cells, unknown in [
        (spelled, {("hr", 0): 80}, 0),
        ({**spelled, "system": "http://snomed.info/sct", "code": "/min"}, {}, 1),
        ({**spelled, "code": "/min"}, {}, 1),
        ({**spelled, "comparator": ">="}, {("hr", 0): 80}, 0),
    ]:
        found = reading(fhir_observation("o", 1, *PULSE, valueQuantity=quantity))
        row = found.cohort.report.values["hr"]
        assert (measured(found), row["unknown unit"]) == (cells, unknown)
        assert row["with a comparator"] == int("comparator" in quantity)
    assert [m.comparator for m in found.measurements] == [">="]
    assert found.cohort.report.lines() == ["hr: 1 values used, 1 with a comparator"]
    assert [m.known for m in found.measurements] == [datetime.fromisoformat(fhir_time(1))]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"status": "entered-in-error"}, "observations of status 'entered-in-error'"),
        ({"status": "cancelled"}, "observations of status 'cancelled'"),
        ({"status": "preliminary"}, "observations of status 'preliminary'"),
        ({"status": None}, "observations without a status of FHIR R4"),
        ({"code": None}, "values without a LOINC code"),
        ({"code": {"coding": [{"code": "8867-4"}]}}, "values without a LOINC code"),
        ({"code": {"coding": [{"system": "urn:oid:1.2.3", "code": "8867-4"}]}}, "values without a LOINC code"),
        ({"code": PANEL}, "values of no variable of the table"),
        (
            {"code": {"coding": [{"system": LOINC, "code": code} for code in ("8867-4", "9279-1")]}},
            "values of several variables at once",
        ),
        ({"valueQuantity": None}, "values that are missing"),
        ({"valueQuantity": None, "valueString": "see comment"}, "values that are no number"),
        ({"valueQuantity": {"value": "80", "unit": "/min"}}, "values that are no number"),
        ({"valueQuantity": {"value": math.inf, "unit": "/min"}}, "values that are no number"),
        ({"valueQuantity": {"value": True, "unit": "/min"}}, "values that are no number"),
        ({"valueQuantity": {"value": 80, "unit": "/min", "comparator": "~"}}, "values of an unknown comparator"),
        ({"effectiveDateTime": None}, "observations without a time at which they were known"),
        ({"effectiveDateTime": "2026-03-01"}, "observations without an hour"),
        ({"effectiveDateTime": "2026-13-01T08:00:00Z"}, "observations whose time cannot be read"),
        ({"effectiveDateTime": "yesterday"}, "observations whose time cannot be read"),
        ({"issued": "2026-03-01"}, "observations without an hour"),
        ({"effectiveDateTime": "0001-01-01T00:00:00+14:00"}, "observations whose time cannot be read"),
        ({"effectiveDateTime": "9000-01-01T00:00:00Z"}, "values after the last hour"),
        ({"effectiveDateTime": fhir_time(-1)}, "values before admission"),
        ({"encounter": {"reference": "Encounter/e3"}}, "observations of an encounter that is not among the stays"),
        ({"subject": {"reference": "Patient/p2"}}, "observations of another patient than their encounter"),
        ({"encounter": None, "subject": None}, "observations of no stay"),
        ({"encounter": None, "effectiveDateTime": fhir_time(-1)}, "observations of no stay"),
    ],
)
def test_what_is_left_out_is_counted(changes, reason):
    found = reading(fhir_observation("good", 1, "2951-2", 140, "mmol/L"), fhir_observation("o", 1, *PULSE, **changes))
    assert left_out(found) == {reason: 1}
    assert measured(found) == {("na", 0): 140}
    assert found.basis("Encounter/e1") == ("Observation/good",)


def test_repeated_resources_count_once():
    """By id the version that was updated last counts, even to take a value back; without ids, equal values at once."""
    stamped = {"meta": {"lastUpdated": fhir_time(90)}}
    found = reading(
        fhir_observation("a", 1, *PULSE, status="corrected", **stamped) | fhir_quantity("8867-4", 85, "/min"),
        fhir_observation("a", 1, *PULSE),
        fhir_observation("b", 61, *PULSE),
        fhir_observation("b", 61, *PULSE, status="entered-in-error"),
        fhir_observation("c", 121, *PULSE),
        fhir_observation("d", 121, *PULSE),
    )
    assert measured(found) == {("hr", 0): 85, ("hr", 2): 80}
    assert found.cohort.grid.counts_NTV.max() == 1
    assert left_out(found) == {
        "Observation resources that repeat an id": 2,
        "observations of status 'entered-in-error'": 1,
        "values that repeat another of the same time": 1,
    }
    assert measured(reading(fhir_observation("p", 1, *PULSE, status="preliminary"), preliminary=True))
    bundle = fhir_bundle([*fhir_stays(), fhir_observation("a", 1, *PULSE)])
    bundle["entry"].insert(0, {"request": {"method": "DELETE", "url": "Observation/a"}})
    history = read([("history", bundle)], FhirOptions())
    assert (measured(history), left_out(history)) == ({}, {"resources that were deleted later": 1})


def test_a_result_counts_from_the_time_it_was_there():
    period = {"start": fhir_time(1), "end": fhir_time(190)}
    observations = [
        fhir_observation("sample", 30, *PULSE, issued=fhir_time(61)),
        fhir_observation("date", 0, "2951-2", 140, "mmol/L", effectiveDateTime="2026-03-01", issued=fhir_time(121)),
        fhir_observation("period", 0, "9187-6", 90, "mL", effectiveDateTime=None, effectivePeriod=period),
    ]
    found = reading(*observations)
    assert measured(found) == {("hr", 1): 80, ("na", 2): 140, ("urine", 3): 90}
    assert found.cohort.grid.hours_N.tolist() == [48, 48]
    cut = reading(*observations, at=fhir_time(121))
    assert (measured(cut), cut.cohort.grid.hours_N.tolist()) == ({("hr", 1): 80, ("na", 2): 140}, [3, 3])
    assert left_out(cut) == {"observations known only after the time of prediction": 1}
    with pytest.raises(ValueError, match=r"no Encounter that is a stay .*that begin after the time of prediction': 2"):
        reading(at=fhir_time(-1))
    with pytest.raises(ValueError, match="at='2026-03-01' is no time with an hour"):
        reading(at="2026-03-01")


def test_times_without_an_offset():
    """Refused unless a zone is named; the hour that clocks repeat is left out, for it names two times."""
    local = fhir_observation("o", 0, *PULSE, effectiveDateTime="2026-03-01T10:00:00")
    with pytest.raises(
        ValueError, match=r"request, entry 4: Observation.effectiveDateTime='2026-03-01T10:00:00' has no"
    ):
        reading(local)
    assert measured(reading(local, tz="Europe/Berlin")) == {("hr", 0): 80}  # 09:00 UTC, half an hour after admission
    twice = {**local, "effectiveDateTime": "2026-10-25T02:30:00"}
    assert left_out(reading(twice, tz="Europe/Berlin")) == {"observations whose time cannot be read": 1}
    with pytest.raises(ValueError, match="tz='Berlin' is no time zone"):
        reading(local, tz="Berlin")


def test_encounters():
    """Which are stays, how long they last, and which have a label."""
    stays = fhir_stays()
    one = stays[2]
    short = {**one, "id": "short", "period": {"start": fhir_time(0), "end": fhir_time(125)}}
    going_on = {**one, "id": "going on", "status": "in-progress", "period": {"start": fhir_time(0)}}
    planned, unknown = {**one, "id": "planned", "status": "planned"}, {**one, "id": "nobody's", "subject": {}}
    day, visit = (
        {**one, "id": "day", "period": {"start": "2026-03-01"}},
        {**one, "id": "visit", "class": {"code": "AMB"}},
    )
    odd = {**one, "id": "odd", "period": {"start": fhir_time(9), "end": fhir_time(0)}}
    resources = [*stays, short, going_on, planned, unknown, day, visit, odd]
    found = read([("request", fhir_bundle(resources))], FhirOptions(classes=("IMP",), hours=24))
    assert found.cohort.stay_ids == tuple(f"Encounter/{name}" for name in ("e1", "e2", "short", "going on"))
    assert found.cohort.grid.hours_N.tolist() == [24, 24, 3, 24]
    np.testing.assert_array_equal(found.cohort.label("mortality"), [1, 0, np.nan, np.nan])
    assert left_out(found) == {
        "encounters of status 'planned'": 1,
        "encounters without a patient": 1,
        "encounters without an hour of period.start": 1,
        "encounters of another class": 1,
        "encounters that end before they begin": 1,
    }
    with pytest.raises(ValueError, match="has no label 'mortality'"):
        read([("request", going_on)], FhirOptions()).cohort.label("mortality")
    with pytest.raises(ValueError, match="request: Encounter has actualPeriod, which is of FHIR R5"):
        read([("request", {**one, "actualPeriod": {}})], FhirOptions())
    ambiguous = reading(short, fhir_observation("o", 5, *PULSE, encounter=None))
    assert left_out(ambiguous) == {"observations that name no encounter and lie in several": 1}


def test_files(tmp_path):
    """One data set as a bundle with references to URNs, as nested bundles, and as NDJSON: the same cohort."""
    resources = [*fhir_stays(), fhir_observation("o", 30, *PULSE), {"resourceType": "Condition"}]
    write_csv(tmp_path / "nested.json", json.dumps(fhir_bundle([fhir_bundle(resources[:3]), *resources[3:]])))
    for resource in resources:
        write_csv(tmp_path / "lines" / f"{resource['resourceType']}.ndjson", "")
    for resource in resources:
        with (tmp_path / "lines" / f"{resource['resourceType']}.ndjson").open("a") as file:
            file.write(json.dumps(resource) + "\r\n\n")
    text = json.dumps(fhir_bundle(resources)).replace('"Patient/', '"urn:uuid:').replace('"Encounter/', '"urn:uuid:')
    unnamed = json.loads(text)
    for entry in unnamed["entry"]:
        entry["fullUrl"] = f"urn:uuid:{entry['resource'].get('id')}"
        if entry["resource"]["resourceType"] == "Patient":
            del entry["resource"]["id"]
    write_csv(tmp_path / "unnamed.json.gz", "\ufeff" + json.dumps(unnamed))
    whole = load_cohort("fhir", tmp_path / "nested.json", hours=3)
    assert whole.grid.counts_NTV.sum() == 1
    assert whole.report.left_out["resources of other types"] == 1
    for name in ("lines", "unnamed.json.gz"):
        other = load_cohort("fhir", tmp_path / name, hours=3)
        np.testing.assert_array_equal(other.grid.values_NTV, whole.grid.values_NTV)
        np.testing.assert_array_equal(other.statics_NS, whole.statics_NS)
        np.testing.assert_array_equal(other.label("mortality"), whole.label("mortality"))
    assert (other.stay_ids, other.patient_ids) == (("Encounter/e1", "Encounter/e2"), ("urn:uuid:p1", "urn:uuid:p2"))
    for name, content, told in [
        ("a.ndjson", '{"resourceType": "Patient"}\n{"resourceType":', r"a\.ndjson, line 2 is no JSON"),
        ("a.json", "[" * 100_000, r"a\.json is no JSON"),
        ("a.csv", "", r"a\.csv is not called \.json"),
        ("a.json", '{"resourceType": "Patient"}', r"no Encounter that is a stay \(none at all\)"),
        ("a.json", "3", r"no Encounter that is a stay"),
    ]:
        write_csv(tmp_path / name, content)
        with pytest.raises(ValueError, match=told):
            load_cohort("fhir", tmp_path / name)
    for options, told in [
        ({"names": "mimic"}, "names='mimic' is no table of variables"),
        ({"names": ["yaib"]}, r"names=\['yaib'\] is no table of variables"),
        ({"preliminary": "no"}, "preliminary='no' is neither true nor false"),
        ({"classes": "IMP"}, r"classes='IMP' is one text; give a list"),
        ({"variables": ("sofa",)}, "'sofa' can never be a feature"),
        ({"hours": 0}, "hours=0 is no length"),
    ]:
        with pytest.raises(ValueError, match=told):
            load_cohort("fhir", tmp_path / "nested.json", **options)


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """(the object or list, the name or place in it) of everything below a node."""
    for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield node, key
        yield from places(node[key])


def test_elements_of_wrong_kinds_end_in_a_cohort_or_a_message():
    """Whatever stands in the place of an element, no other error than ValueError comes out."""
    component = fhir_observation("p", 1, *PULSE, component=[fhir_quantity("8480-6", 120, "mm[Hg]")])
    whole = fhir_bundle([*fhir_stays()[::2], {**component, "issued": fhir_time(2), "meta": {"lastUpdated": "x"}}])
    outcomes = set()
    for number in range(len(list(places(whole)))):
        for junk in (None, "x", -3, [], [{}], {"value": [1]}):
            bundle = copy.deepcopy(whole)
            node, key = list(places(bundle))[number]
            node[key] = junk
            try:
                outcomes.add(f"{len(read([('request', bundle)], FhirOptions(hours=2)).cohort)} stay")
            except ValueError as error:
                outcomes.add(str(error).partition(" (")[0])
    assert outcomes == {"1 stay", "there is no Encounter that is a stay"}


def test_loinc_codes():
    """Check digits are right, each code is of one quantity, and each variable of the tables but these has one."""
    for code in loinc.QUANTITIES:
        digits, check = code.split("-")
        doubled = [int(digit) * (1 + (i % 2 == 0)) for i, digit in enumerate(reversed(digits))]
        assert (10 - sum(d - 9 * (d > 9) for d in doubled) % 10) % 10 == int(check), code
    given = [code for codes in loinc._CODES.values() for code in codes.split()]
    assert sorted({*given, *loinc._ARTERIAL_LINE.values()}) == sorted([*given, *loinc._ARTERIAL_LINE.values()])
    assert set(loinc.QUANTITIES.values()) <= set(QUANTITIES)
    tables = {**PHYSIONET2012, **YAIB, **MIMIC3}
    missing = {row.quantity for row in tables.values()} - set(loinc.QUANTITIES.values())
    assert missing == {"ventilated", "capillary_refill"}
    assert all(scale_of(row, row.unit) == (1, 0) for row in (*tables.values(), *STATICS.values()) if row.quantity)
    names = loinc.names_by_code(PHYSIONET2012)
    assert [names[code] for code in ("8480-6", "76534-7", "76215-3")] == ["NISysABP", "NISysABP", "SysABP"]
    assert loinc.names_by_code(YAIB)["76215-3"] == "sbp"
    assert not measured(
        reading(fhir_observation("o", 1, "8480-6", 120, "mm[Hg]"), names="physionet2012", variables=("SysABP",))
    )


def test_the_basis_of_a_prediction():
    found = reading(
        fhir_observation("good", 1, *PULSE),
        fhir_observation("impossible", 2, "8867-4", 9999, "/min"),
        {**fhir_observation("", 3, "2951-2", 140, "mmol/L"), "id": None},
    )
    assert found.basis("Encounter/e1") == ("Observation/good",), "what was dropped, and what has no id, is no basis"
