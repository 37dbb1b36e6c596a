"""The request of POST /v1/predict: typed, with units in the names of fields or beside the value, in UCUM."""

from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from serve.openai.errors import ApiError, short_name
from serve.openai.invalid import validated
from serve.openai.json_body import read_object
from serve.openai.protocol import Label, Strict

Hour = Annotated[float, Field(ge=-1e6, le=1e6)]
Explain = Literal["none", "attention", "gradients"]
MAX_QUERY = 16
"""Most parameters of a query."""


class MeasurementEntry(Strict):
    """One measured value. hour: since admission; time: with its offset from UTC, needs the patient's `admitted`; one of
    the two says when the value was known. unit: in UCUM; "1" for a number without a unit."""

    variable: Label
    hour: Hour | None = None
    time: Label | None = None
    value: Annotated[float, Field(ge=-1e9, le=1e9)]
    unit: Label


class PatientEntry(Strict):
    """One patient. Facts that are null or left out are unknown. cutoff_hour: what was known from then on is not used,
    and the stay lasts until then; None: that of the request, else the hour after the last measurement. admitted: the
    time of hour 0, with its offset from UTC."""

    id: Annotated[Label, Field(min_length=1)]
    age_years: Annotated[float, Field(ge=0, le=200)] | None = None
    height_cm: Annotated[float, Field(ge=0, le=1000)] | None = None
    weight_kg: Annotated[float, Field(ge=0, le=2000)] | None = None
    sex: Literal["female", "male", "unknown"] | None = None
    icu_type: Literal["coronary care", "cardiac surgery recovery", "medical", "surgical"] | None = None
    admitted: Label | None = None
    cutoff_hour: int | None = None
    measurements: Annotated[list[MeasurementEntry], Field(fail_fast=True)]


class PredictOptions(Strict):
    """What both forms of the request say. model: None: the only clinical model. explain: what the prediction looked at.
    hourly: also the risk after each hour. stream: send it hour by hour, for one patient; implies hourly."""

    model: str | None = None
    explain: Explain = "none"
    hourly: bool = False
    cutoff_hour: int | None = None
    stream: bool = False


class NamedModel(Strict):
    """What every request has."""

    model: str


class PredictRequest(PredictOptions):
    """Body of POST /v1/predict."""

    model: str
    patients: Annotated[list[PatientEntry], Field(fail_fast=True, min_length=1)]


class BundleOptions(PredictOptions):
    """Query of POST /v1/predict where the body is a FHIR bundle. at: the time of the prediction, with its offset from
    UTC; tz: the time zone of times without an offset."""

    at: Label | None = None
    tz: Label | None = None


def read_values(body: bytes) -> dict[str, Any]:
    """The fields of a body, the model's name being a text. Raises ApiError 400 that names the field."""
    values = read_object(body, "model and patients")
    if "resourceType" in values:
        what = "the body is a FHIR resource; send it as content-type: application/fhir+json, options in the query"
        raise ApiError(400, what, param="resourceType")
    # Which fields a request has depends on its model.
    named = {name: value for name, value in values.items() if name == "model"}
    validated(NamedModel, named, lambda where: [])
    return values


def parse_predict(values: dict[str, Any]) -> PredictRequest:
    """Reads the values of a body. Raises ApiError 400 that names the first field that is wrong or unknown."""
    return validated(PredictRequest, values, partial(_fields, PredictRequest))


def parse_bundle_options(query: list[tuple[str, str]]) -> BundleOptions:
    """Parses the query of a request with a bundle. Raises ApiError 400 that names the parameter."""
    if len(query) > MAX_QUERY:
        raise ApiError(400, f"the query has {len(query)} parameters; at most {MAX_QUERY} are read")
    values: dict[str, Any] = {}
    for name, text in query:
        if name in values:
            raise ApiError(400, f"{short_name(name)} is given twice in the query; give it once", param=short_name(name))
        values[name] = _value(name, text)
    return validated(BundleOptions, values, partial(_fields, BundleOptions))


def _value(name: str, text: str) -> Any:
    """A parameter's value; texts that are no value of their type stay texts, and are refused as such."""
    if name in ("hourly", "stream"):
        return {"true": True, "false": False}.get(text, text)
    if name == "cutoff_hour" and text.isascii() and text.isdigit() and len(text) < 10:
        return int(text)
    return text.replace(" ", "+") if name == "at" else text  # a plus sign means a space in a query


def _fields(kind: type[BaseModel], where: tuple[int | str, ...]) -> list[str]:
    """Names of the fields that the object at a place may have."""
    if "measurements" in where[:-1]:
        return list(MeasurementEntry.model_fields)
    return list(PatientEntry.model_fields if "patients" in where[:-1] else kind.model_fields)
