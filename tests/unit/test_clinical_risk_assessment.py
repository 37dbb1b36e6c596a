"""A prediction as a RiskAssessment of FHIR R4, through JSON and back."""

import json
import math
from datetime import UTC, datetime

import pytest

from attnzoo.clinical.risk_assessment import Risk, read_risk_assessment, risk_assessment

START = datetime(2026, 3, 1, 8, 30, tzinfo=UTC)


def test_round_trip():
    risk = Risk(
        subject="Patient/p1",
        encounter="Encounter/e1",
        occurrence=START,
        outcome="death in hospital",
        probability=0.137,
        method="ehr-encoder 1.2",
        basis=("Observation/good", "urn:uuid:7"),
        rationale="interval .10 to .18",
    )
    resource = json.loads(json.dumps(risk_assessment(risk)))
    assert read_risk_assessment(resource) == risk
    assert resource == {
        "resourceType": "RiskAssessment",
        "status": "final",
        "subject": {"reference": "Patient/p1"},
        "encounter": {"reference": "Encounter/e1"},
        "occurrenceDateTime": "2026-03-01T08:30:00+00:00",
        "method": {"text": "ehr-encoder 1.2"},
        "basis": [{"reference": "Observation/good"}, {"reference": "urn:uuid:7"}],
        "prediction": [
            {
                "outcome": {"text": "death in hospital"},
                "probabilityDecimal": 13.7,
                "rationale": "interval .10 to .18",
            }
        ],
    }
    given = {"subject": "Patient/p1", "occurrence": START, "outcome": "death", "method": "m"}
    least = Risk(**given, probability=1)
    assert read_risk_assessment(risk_assessment(least)) == least
    assert not {"basis", "encounter"} & set(risk_assessment(least))
    for changes, told in [
        ({"probability": 1.1}, "probability=1.1 is no probability"),
        ({"probability": math.nan}, "probability=nan is no probability"),
        ({"probability": 0.5, "subject": ""}, "takes a subject"),
        ({"probability": 0.5, "occurrence": START.replace(tzinfo=None)}, "has no offset from UTC"),
    ]:
        with pytest.raises(ValueError, match=told):
            Risk(**{**given, **changes})
    for changes, told in [
        ({"resourceType": "Patient"}, "resourceType is not 'RiskAssessment'"),
        ({"prediction": []}, "cannot be read"),
        ({"prediction": [{"outcome": {"text": "death"}}]}, "without a probability takes a rationale"),
        ({"method": "m"}, "cannot be read"),
    ]:
        with pytest.raises(ValueError, match=told):
            read_risk_assessment({**resource, **changes})
