"""The request of POST /v1/predict to a model that reads texts."""

from functools import partial
from typing import Annotated, Any

from pydantic import Field

from serve.clinical.protocol import Explain, MeasurementEntry, validated
from serve.openai.errors import ApiError, short_name
from serve.openai.protocol import Label, Strict

MAX_CHARACTERS = 65_536
"""Longest text, in characters: far more than any model reads of one."""
SPACES = "\t\n\r\f\v"
"""Control characters that texts have."""
OF_SERIES = ("measurements", "admitted", "cutoff_hour")
"""Fields of a patient that are for models of series."""


class NoteEntry(Strict):
    """One patient. text: of the note; the model reads its first tokens, and the reply says where it ended.
    measurements, admitted, cutoff_hour: as of other clinical models, where the model reads series too."""

    id: Annotated[Label, Field(min_length=1)]
    text: Annotated[str, Field(max_length=MAX_CHARACTERS)]
    admitted: Label | None = None
    cutoff_hour: int | None = None
    measurements: Annotated[list[MeasurementEntry], Field(fail_fast=True)] | None = None


class NotesRequest(Strict):
    """Body of POST /v1/predict for a model that reads texts. explain: what the prediction looked at, word by word.
    explain_labels: whose explanations are told; null: those of all labels."""

    model: str
    explain: Explain = "none"
    explain_labels: Annotated[list[Label], Field(fail_fast=True, min_length=1)] | None = None
    cutoff_hour: int | None = None
    patients: Annotated[list[NoteEntry], Field(fail_fast=True, min_length=1)]


def parse_notes(values: dict[str, Any], labels: tuple[str, ...], of_series: bool = False) -> NotesRequest:
    """Reads the values of a body. labels: of the model; of_series: whether it reads series beside texts. Raises
    ApiError 400 that names the field."""
    for name in ("hourly", "stream"):
        if name in values:
            text = f"{name} is for models of measurements: a text is not read hour by hour; leave it out"
            raise ApiError(400, text, param=name, code="unsupported")
    found = validated(NotesRequest, values, partial(_fields, of_series))
    _check_labels(found, labels)
    for row, entry in enumerate(found.patients):
        check_text(entry.text, f"patients[{row}].text")
    return found


def _check_labels(request: NotesRequest, labels: tuple[str, ...]) -> None:
    if request.explain_labels is None:
        return
    if request.explain == "none":
        text = "explain_labels has no effect without explain; take explain='gradients' or 'attention', or leave it out"
        raise ApiError(400, text, param="explain_labels")
    for place, label in enumerate(request.explain_labels):
        where = f"explain_labels[{place}]"
        if label not in labels:
            known = ", ".join(labels)
            raise ApiError(400, f"{where}={short_name(label)!r} is no label of this model; known: {known}", param=where)
        if label in request.explain_labels[:place]:
            raise ApiError(400, f"{where}={short_name(label)!r} is given twice; give it once", param=where)


def check_text(text: str, where: str) -> None:
    """Raises ApiError for control characters, which stand in no note and tell of a wrong decoding."""
    if text.isprintable():
        return
    for place, character in enumerate(text):
        if (character < " " and character not in SPACES) or "\x7f" <= character <= "\x9f":
            what = f"{where} holds the control character U+{ord(character):04X} at character {place}"
            raise ApiError(400, f"{what}, which no note has; decode it as it was encoded, or remove it", param=where)


def _fields(of_series: bool, where: tuple[int | str, ...]) -> list[str]:
    """Names of the fields that the object at a place may have, of a model of texts alone those of texts."""
    if "measurements" in where[:-1]:
        return list(MeasurementEntry.model_fields)
    names = NoteEntry.model_fields if "patients" in where[:-1] else NotesRequest.model_fields
    return [name for name in names if of_series or name not in OF_SERIES]
