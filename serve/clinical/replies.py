"""Pydantic models of the replies of /v1/predict: the source of their OpenAPI schemas."""

from typing import Any, Literal

from serve.openai.answers import Reply

Status = Literal["ok", "not_enough_data"]


class ServedModel(Reply):
    """version: digest of the export. weights_digest, data_digest: sha256 of the weights, and of the stays of each part
    of the split with digests of their values; in exports of before of the stays alone. trained_on: the data set."""

    id: str
    version: str
    weights_digest: str
    data_digest: str | None
    trained_on: str
    training_stays: int


class PredictedOutcome(Reply):
    """What is predicted. window_hours: hours of a stay that the model sees at most. edges: of buckets."""

    label: str
    words: str
    kind: Literal["yes_no", "buckets"]
    window_hours: int
    each_hour: bool
    edges: list[float]


class IntervalMeaning(Reply):
    """What low and high mean."""

    level: float
    method: str
    words: str


class BaseRate(Reply):
    """The share of training stays with the outcome."""

    probability: float
    stays: int
    words: str


class ServedVariable(Reply):
    """A variable of the model; all values of a reply are in its unit. units: other units that are known for it."""

    name: str
    meaning: str
    unit: str
    plausible: list[float]
    units: list[str] | None = None


class RiskNumbers(Reply):
    """A probability with its interval, or buckets; null where there is not enough data."""

    probability: float | None
    low: float | None
    high: float | None
    buckets: list[dict[str, float | None]] | None


class HourRisk(RiskNumbers):
    """The risk after so many hours of the stay. coverage: the share of cells measured until then."""

    hour: int
    status: Status
    coverage: float


class HourEvent(HourRisk):
    """An event of a stream."""

    object: Literal["prediction.hour"]


class CoverageReply(Reply):
    """The share of measured cells, and that which 99 % of the training stays reach."""

    measured: float
    least: float


class GivenReply(Reply):
    """A value as it was sent, or the reference of its FHIR Observation."""

    value: float | None
    unit: str | None
    reference: str | None


class CellReply(Reply):
    """A cell of the grid of hours and variables: what the model was given. measured false: all values were refused."""

    hour: int
    variable: str
    measured: bool
    value: float | None
    unit: str
    count: int
    flag: Literal["clipped", "implausible"] | None
    given: GivenReply


class LeftOutValue(Reply):
    """A value that was not used."""

    field: str
    reason: str
    words: str


class MeasurementReply(Reply):
    """What became of the values: used, of these clipped to the plausible range, rejected by reason."""

    given: int
    used: int
    clipped: int
    rejected: dict[str, int]
    by_variable: dict[str, dict[str, int]]
    examples: list[LeftOutValue]


class ContributionReply(Reply):
    """What a measured cell contributes; cells that are not listed were not measured."""

    hour: int
    variable: str
    contribution: float


class FindingReply(Reply):
    """A variable with one of the largest sums, also in words."""

    variable: str
    amount: float
    share: float
    hours: list[int]
    words: str


class ExplanationReply(Reply):
    """What a prediction looked at. faithful: whether the map beats random ones; null: not known."""

    name: str
    title: str
    signed: bool
    unit: Literal["logit", "share"]
    explains: str
    logit: float | None
    logit_without_measurements: float | None
    faithful: bool | None
    faithfulness: str
    cells: list[ContributionReply]
    findings: list[FindingReply]


class PredictedPatient(RiskNumbers):
    """One patient. input_digest: sha256 of what the model was given."""

    id: str
    status: Status
    reasons: list[str]
    coverage: CoverageReply
    cutoff_hour: int
    cutoff_time: str | None
    input_digest: str
    by_hour: list[HourRisk]
    measurements: MeasurementReply
    cells: list[CellReply]
    explanations: list[ExplanationReply]
    explanation_reason: str | None


class BundleReply(Reply):
    """What was left out of a FHIR bundle before its values were given to patients."""

    left_out: dict[str, int]
    unknown_units: dict[str, int]


class PredictionList(Reply):
    """Body of a reply, and the last event of a stream. bundle: where the request was one. early_hours: what
    is not known about risks before the end of the model's window."""

    id: str
    object: Literal["prediction.list"]
    created: int
    model: ServedModel
    research_use_only: str
    outcome: PredictedOutcome
    interval: IntervalMeaning | None
    interval_reason: str | None
    early_hours: str | None
    base_rate: BaseRate | None
    variables: list[ServedVariable]
    patients: list[PredictedPatient]
    bundle: BundleReply | None = None


class ClinicalCard(Reply):
    """A clinical model of measurements in the list of models. statics: fields of a patient that it takes; explains:
    values of `explain`."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    kind: Literal["clinical"]
    reads: list[Literal["measurements"]]
    version: str
    research_use_only: str
    outcome: PredictedOutcome
    base_rate: BaseRate | None
    least_coverage: float
    window_hours: int
    max_patients: int
    explains: list[str]
    statics: list[str]
    variables: list[ServedVariable]


REPLIES: tuple[Any, ...] = (PredictionList, HourEvent, ClinicalCard)
