"""Pydantic models of the replies of models that read texts: the source of their OpenAPI schemas."""

from typing import Any, Literal

from serve.clinical.replies import CoverageReply, IntervalMeaning, MeasurementReply, ServedVariable, Status
from serve.openai.answers import Reply


class NoteModel(Reply):
    """As `ServedModel`; training_stays is null in exports of before it was kept."""

    id: str
    version: str
    weights_digest: str
    data_digest: str | None
    trained_on: str | None
    training_stays: int | None


class ServedLabel(Reply):
    """A label: its definition, which the model has read, and the share of training stays that have it."""

    label: str
    definition: str
    base_rate: float | None


class LabelOutcome(Reply):
    """What is told of a text. exclusive: the labels exclude one another, and their probabilities add up to 1."""

    kind: Literal["labels"]
    exclusive: bool
    labels: list[ServedLabel]


class TextReply(Reply):
    """What became of a text. tokens: words, digits and marks of punctuation; tokens_read: of these, the first ones.
    read_until: the character at which reading ended. cut: whether there is more. words: without digits and marks, of
    those that were read; known_words: of these that the model knows."""

    characters: int
    tokens: int
    tokens_read: int
    read_until: int
    cut: bool
    cut_reason: str | None
    words: int
    known_words: int


class LabelRisk(Reply):
    """The probability of a label with its interval, which is null where none is known."""

    label: str
    probability: float
    low: float | None
    high: float | None


class ReadWord(Reply):
    """A token of the text that was read, from character `start` up to `end`."""

    word: str
    start: int
    end: int
    known: bool


class LabelMap(Reply):
    """The weights of all words for one label, in the order of `words`; null for words that the model does not know.
    Signed ones add up to log_odds - log_odds_without_words."""

    label: str
    explains: str
    log_odds: float | None
    log_odds_without_words: float | None
    weights: list[float | None]


class WordExplanation(Reply):
    """What a prediction looked at. faithful: whether the map beats random ones; null: not known."""

    name: str
    title: str
    signed: bool
    unit: Literal["logit", "share"]
    faithful: bool | None
    faithfulness: str
    labels: list[LabelMap]


class ReadPatient(Reply):
    """One patient. labels: empty where there is not enough data. input_digest: sha256 of what the model was given.
    cutoff_hour, coverage, measurements: null where the model reads no series."""

    id: str
    status: Status
    reasons: list[str]
    text: TextReply
    cutoff_hour: int | None
    coverage: CoverageReply | None
    measurements: MeasurementReply | None
    input_digest: str
    labels: list[LabelRisk]
    words: list[ReadWord]
    explanations: list[WordExplanation]
    explanation_reason: str | None


class LabelList(Reply):
    """Body of a reply."""

    id: str
    object: Literal["prediction.list"]
    created: int
    model: NoteModel
    research_use_only: str
    outcome: LabelOutcome
    interval: IntervalMeaning | None
    interval_reason: str | None
    variables: list[ServedVariable]
    patients: list[ReadPatient]


class NoteCard(Reply):
    """A model that reads texts in the list of models. max_tokens: that are read of a text. least_known_words,
    least_known_share, least_coverage: below them there is not enough data; null where none is known."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    kind: Literal["clinical"]
    reads: list[Literal["text", "measurements"]]
    version: str
    research_use_only: str
    outcome: LabelOutcome
    max_characters: int
    max_tokens: int
    least_known_words: int | None
    least_known_share: float | None
    least_coverage: float | None
    window_hours: int | None
    max_patients: int
    explains: list[str]
    variables: list[ServedVariable]


REPLIES: tuple[Any, ...] = (LabelList, NoteCard)
