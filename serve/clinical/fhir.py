"""FHIR R4 at both ends: a bundle of patients as the intake, and RiskAssessments as the reply."""

from collections import Counter
from dataclasses import replace
from datetime import datetime
from typing import Any

import numpy as np

from attnzoo.clinical.cohort import Cohort
from attnzoo.clinical.formats.fhir import FhirCohort, FhirOptions, read
from attnzoo.clinical.formats.observations import Measurement, Stay
from attnzoo.clinical.risk_assessment import Risk, check_reference, risk_assessment
from serve.clinical.intake import (
    Admitted,
    GivenValue,
    Intake,
    Needs,
    ValueAccount,
    cells_of,
    check_cutoff,
    check_number,
    cut,
    last_hour,
    within,
)
from serve.clinical.predictor import Predictor
from serve.clinical.protocol import BundleOptions
from serve.openai.errors import MAX_QUOTED, ApiError
from serve.openai.json_body import read_object

ENTRIES = "entry"


def read_bundle(body: bytes, options: BundleOptions, predictor: Predictor) -> Intake:
    """The intake of a bundle: its encounters are the patients. An encounter without an end lasts until the time of the
    prediction (`at`), else until the hour after its last measurement. Raises ApiError 400."""
    content, needs = read_object(body, "resourceType and entry"), predictor.needs
    if content.get("resourceType") != "Bundle":
        text = "the resource is no Bundle; send Patient, Encounter and Observation in the entries of a Bundle"
        raise ApiError(400, text, param="resourceType")
    if predictor.names is None:
        raise ApiError(400, "the variables of this model have no LOINC codes here; send JSON instead", param="model")
    check_cutoff(options.cutoff_hour, needs.window, "cutoff_hour")
    try:
        found = read(
            [("the bundle", content)],
            FhirOptions(
                hours=needs.window, variables=tuple(needs.table), names=predictor.names, tz=options.tz, at=options.at
            ),
        )
    except ValueError as error:
        raise ApiError(400, str(error)[:MAX_QUOTED], param=_field(str(error))) from None
    check_number(len(found.cohort), needs.max_patients, ENTRIES)
    return _intake(found, options, needs)


def _field(message: str) -> str:
    """The field that an error of the parser is about."""
    return next((name for name in ("at", "tz") if message.removeprefix("options: ").startswith(f"{name}=")), ENTRIES)


def _intake(found: FhirCohort, options: BundleOptions, needs: Needs) -> Intake:
    place = {name: i for i, name in enumerate(needs.table)}
    by_row: list[list[Measurement]] = [[] for _ in found.stays]
    for measurement in found.measurements:
        if measurement.name in place:
            by_row[measurement.stay].append(measurement)
    hours_N = np.array(
        [_hours(stay, own, options, needs.window) for stay, own in zip(found.stays, by_row, strict=True)], np.int64
    )
    whole = replace(found, cohort=cut(_as_model(found.cohort, needs), hours_N))
    patients, values = [], []
    for row, (stay, own) in enumerate(zip(found.stays, by_row, strict=True)):
        account, hours = ValueAccount(given=len(own)), int(whole.cohort.grid.hours_N[row])
        given = [
            GivenValue(
                row=row,
                minute=one.minute,
                variable=place[one.name],
                value=one.value,
                where=one.source.where,
                given={"value": None, "unit": None, "reference": one.source.key},
            )
            for one in own
        ]
        values += within(given, hours, needs.table, account)
        patients.append(
            Admitted(
                id=stay.key,
                hours=hours,
                start=stay.start,
                at=found.at,
                account=account,
                subject=stay.patient,
                encounter=stay.key if stay.is_referable else None,
                basis=whole.basis(stay.key),
            )
        )
    report = found.cohort.report
    units = Counter({name: row["unknown unit"] for name, row in report.values.items() if row["unknown unit"]})
    lost = {
        f"{name} that is impossible": row["dropped"] for name, row in report.values.items() if name not in needs.table
    }
    left_out = {what: n for what, n in {**report.left_out, **lost}.items() if n}
    bundle = {"left_out": left_out, "unknown_units": dict(units)}
    kept = tuple(patients)
    return Intake(cohort=whole.cohort, patients=kept, cells=cells_of(values, kept, needs.table), bundle=bundle)


def _hours(stay: Stay, own: list[Measurement], options: BundleOptions, window: int) -> int:
    if options.cutoff_hour is not None:
        return options.cutoff_hour
    if options.at is not None or stay.end is not None:
        return min(stay.hours, window)
    return last_hour([one.minute for one in own if one.is_possible], window)


def _as_model(cohort: Cohort, needs: Needs) -> Cohort:
    """With variables and static facts in the model's order; those that FHIR does not tell are unknown."""
    grid = cohort.grid
    columns = [grid.variables.index(name) for name in needs.table]
    values_NTV, counts_NTV = grid.values_NTV[..., columns], grid.counts_NTV[..., columns]
    unknown = np.full(len(cohort), np.nan, np.float32)
    facts = dict(zip(cohort.statics, cohort.statics_NS.T, strict=True))
    statics_NS = np.array([facts.get(name, unknown) for name in needs.statics], np.float32).reshape(-1, len(cohort)).T
    return replace(
        cohort,
        grid=replace(grid, values_NTV=values_NTV, counts_NTV=counts_NTV, variables=tuple(needs.table)),
        statics_NS=statics_NS,
        statics=needs.statics,
    )


def assessments(predictor: Predictor, intake: Intake, patients: list[dict[str, Any]]) -> dict[str, Any]:
    """A RiskAssessment, or a Bundle of them for several patients. Raises ApiError 400 for an outcome that is no yes or
    no, and for a patient whose admission has no time."""
    if predictor.trained.outcome.edges:
        text = "the outcome has buckets, and a RiskAssessment here tells one probability; accept application/json"
        raise ApiError(400, text, param="model")
    found = [_assessment(predictor, intake, row, told) for row, told in enumerate(patients)]
    if len(found) == 1:
        return found[0]
    return {"resourceType": "Bundle", "type": "collection", "entry": [{"resource": one} for one in found]}


def _assessment(predictor: Predictor, intake: Intake, row: int, told: dict[str, Any]) -> dict[str, Any]:
    patient = intake.patients[row]
    if patient.cutoff is None:
        where = f"patients[{row}].admitted"
        text = f"a RiskAssessment has a time, so it needs {where}, the time of hour 0; give it"
        raise ApiError(400, text, param=where)
    cutoff: datetime = patient.cutoff
    subject = patient.subject or f"Patient/{patient.id}"
    for reference in (subject, *filter(None, [patient.encounter]), *patient.basis):
        try:
            check_reference(reference)
        except ValueError as error:
            where = ENTRIES if patient.subject else f"patients[{row}].id"
            what = f"{where}: {str(error)[:MAX_QUOTED]}, or accept application/json"
            raise ApiError(400, what, param=where) from None
    return risk_assessment(
        Risk(
            subject=subject,
            encounter=patient.encounter,
            occurrence=cutoff,
            outcome=predictor.outcome_words,
            probability=told["probability"],
            method=f"attnzoo {predictor.name}, version {predictor.version}; research use only",
            basis=patient.basis,
            rationale=_rationale(predictor, told),
        )
    )


def _rationale(predictor: Predictor, told: dict[str, Any]) -> str:
    if told["probability"] is None:
        return f"Not enough data for a number: {'; '.join(told['reasons'])}."
    known = told["coverage"]["measured"]
    parts = [f"Until hour {told['cutoff_hour']} of the stay, with {known:.1%} of the cells measured."]
    if told["low"] is not None:
        parts.append(f"95 % interval of the calibrated probability: {told['low']:.3f} to {told['high']:.3f}.")
    else:
        parts.append(f"No interval: {predictor.interval()[1]}.")
    return " ".join(parts)
