"""Which form of a reply a client accepts: JSON of our own, or FHIR's."""

from collections.abc import Iterable

from serve.openai.errors import ApiError, short_name

FHIR, JSON = "application/fhir+json", "application/json"
XML = ("application/fhir+xml", "application/xml", "text/xml")
VERSIONS = ("4.0", "4.0.1")
"""Of FHIR, in which RiskAssessments are written."""


def prefers_fhir(headers: Iterable[str]) -> bool:
    """Whether the `accept` headers name FHIR's JSON, and with no smaller weight than JSON. Wildcards name nothing.
    Raises ApiError 400 for a weight that is none, for another version of FHIR, and where XML alone is accepted."""
    weights, others = {FHIR: 0.0, JSON: 0.0}, []
    for part in ",".join(headers).split(","):
        kind, *parameters = (word.strip() for word in part.split(";"))
        if kind.lower() in weights:
            weights[kind.lower()] = _weight(dict(_named(parameters)))
        elif kind:
            others.append(kind.lower())
    if others and set(others) <= set(XML) and not any(weights.values()):
        raise ApiError(400, f"accept: {others[0]} is not written here; accept {FHIR} or {JSON}", param="accept")
    return 0 < weights[FHIR] >= weights[JSON]


def _named(parameters: Iterable[str]) -> Iterable[tuple[str, str]]:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        yield name.strip().lower(), value.strip().strip('"')


def _weight(parameters: dict[str, str]) -> float:
    version, text = parameters.get("fhirversion", VERSIONS[0]), parameters.get("q", "1")
    if version not in VERSIONS:
        what = f"accept: fhirVersion={short_name(version)} is not written here; accept {' or '.join(VERSIONS)}"
        raise ApiError(400, what, param="accept", code="unsupported")
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not 0 <= weight <= 1:
        raise ApiError(400, f"accept: q={short_name(text)!r} is no weight; give one from 0 to 1", param="accept")
    return weight
