"""A prediction as a FHIR R4 RiskAssessment: https://hl7.org/fhir/R4/riskassessment.html ."""

import math
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any

PERCENT = 100
"""R4 writes probabilityDecimal as a percentage."""
DIGITS = 10
"""Digits of the percentage after its point: 100 * 0.137 is not 13.7 in binary."""


REFERENCE = re.compile(r"[A-Z][A-Za-z]*/[A-Za-z0-9.-]{1,64}|[A-Za-z][A-Za-z0-9+.-]*:[!-~]+")
"""Patient/7, or an absolute address: https://example.org/Patient/7, urn:uuid:7."""


def check_reference(text: str) -> None:
    """Raises ValueError for what is no reference to a resource."""
    if REFERENCE.fullmatch(text) is None:
        raise ValueError(
            f"{text!r} is no reference of FHIR: an id has 1 to 64 letters, digits, - and . of ASCII; give such an id"
        )


@dataclass(frozen=True, kw_only=True)
class Risk:
    """What is predicted, of whom, when, by what, and from which observations."""

    subject: str
    """A reference: Patient/7."""
    occurrence: datetime
    """The cut-off: what was known later was not used. With its offset from UTC."""
    outcome: str
    """In words: death in hospital."""
    probability: float | None
    """From 0 to 1; None where there is not enough data for a number, and `rationale` says why."""
    method: str
    """The model and its version."""
    basis: tuple[str, ...] = ()
    """References of the observations used."""
    rationale: str = ""
    """In words: the interval of the probability, and what drives it."""
    encounter: str | None = None

    def __post_init__(self) -> None:
        for name in ("subject", "outcome", "method"):
            if not getattr(self, name):
                raise ValueError(f"a RiskAssessment takes a {name}; got {getattr(self, name)!r}")
        for reference in (self.subject, *([] if self.encounter is None else [self.encounter]), *self.basis):
            check_reference(reference)
        if self.probability is None:
            if not self.rationale:
                raise ValueError("a RiskAssessment without a probability takes a rationale that says why")
        elif not (math.isfinite(self.probability) and 0 <= self.probability <= 1):
            raise ValueError(f"probability={self.probability!r} is no probability; give a number from 0 to 1")
        if self.occurrence.tzinfo is None:
            raise ValueError(f"occurrence={self.occurrence} has no offset from UTC; give it with its time zone")


def risk_assessment(risk: Risk) -> dict[str, Any]:
    """The resource, as plain JSON. Parts that are empty are left out, for FHIR has no empty elements."""
    prediction: dict[str, Any] = {"outcome": {"text": risk.outcome}}
    if risk.probability is not None:
        prediction["probabilityDecimal"] = round(risk.probability * PERCENT, DIGITS)
    if risk.rationale:
        prediction["rationale"] = risk.rationale
    resource: dict[str, Any] = {
        "resourceType": "RiskAssessment",
        "status": "final",
        "method": {"text": risk.method},
        "subject": {"reference": risk.subject},
    }
    if risk.encounter is not None:
        resource["encounter"] = {"reference": risk.encounter}
    resource["occurrenceDateTime"] = risk.occurrence.isoformat()
    if risk.basis:
        resource["basis"] = [{"reference": reference} for reference in risk.basis]
    return {**resource, "prediction": [prediction]}


def read_risk_assessment(resource: dict[str, Any]) -> Risk:
    """What `risk_assessment` wrote. Raises ValueError that names the field for another resource."""
    if not isinstance(resource, dict) or resource.get("resourceType") != "RiskAssessment":
        raise ValueError("resourceType is not 'RiskAssessment'; give a RiskAssessment of FHIR R4")
    try:
        (prediction,) = resource["prediction"]
        percent = prediction.get("probabilityDecimal")
        return Risk(
            subject=resource["subject"]["reference"],
            occurrence=datetime.fromisoformat(resource["occurrenceDateTime"]),
            outcome=prediction["outcome"]["text"],
            probability=None if percent is None else round(percent / PERCENT, DIGITS + 2),
            method=resource["method"]["text"],
            basis=tuple(item["reference"] for item in resource.get("basis", ())),
            rationale=prediction.get("rationale", ""),
            encounter=resource["encounter"]["reference"] if "encounter" in resource else None,
        )
    except KeyError as error:
        raise ValueError(f"RiskAssessment has no {error.args[0]!r}; give what this program wrote") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"RiskAssessment cannot be read: {error}; give what this program wrote") from None
