"""Writes the reply of a model that reads texts, and its card."""

from typing import Any

from attnzoo.clinical.words import spans
from serve.clinical.answer import NOT_ENOUGH, NOTICE, OK, Coverage, head_of, variable_of, variables_with_units
from serve.clinical.notes.explanations import explained, words_of
from serve.clinical.notes.protocol import MAX_CHARACTERS, NotesRequest
from serve.clinical.notes.reader import NoteReader, Notes
from serve.workplace import Deadline


def outcome_of(reader: NoteReader) -> dict[str, Any]:
    """The labels that are told, with their definitions and how frequent they are in the training stays."""
    trained = reader.trained
    shares = [None] * len(trained.labels) if trained.evidence is None else trained.evidence.shares
    labels = [
        {"label": label, "definition": definition, "base_rate": share}
        for label, definition, share in zip(trained.labels, trained.definitions, shares, strict=True)
    ]
    return {"kind": "labels", "exclusive": trained.model.config.exclusive, "labels": labels}


def head(reader: NoteReader) -> dict[str, Any]:
    """What is the same for all patients of a reply."""
    trained = reader.trained
    return head_of(
        reader,
        trained.data.get("cohort"),
        None if trained.evidence is None else trained.evidence.stays,
        outcome=outcome_of(reader),
        variables=[] if reader.needs is None else [variable_of(one) for one in reader.needs.table.values()],
    )


def card(reader: NoteReader, created: int) -> dict[str, Any]:
    """The model in the list of models."""
    needs, evidence, statistics = reader.needs, reader.trained.evidence, reader.trained.statistics
    return {
        "id": reader.name,
        "object": "model",
        "created": created,
        "owned_by": "attnzoo",
        "kind": "clinical",
        "reads": ["text"] if needs is None else ["text", "measurements"],
        "version": reader.version,
        "research_use_only": NOTICE,
        "outcome": outcome_of(reader),
        "max_characters": MAX_CHARACTERS,
        "max_tokens": reader.trained.longest,
        "least_known_words": None if evidence is None else evidence.least_known,
        "least_known_share": None if evidence is None else evidence.least_share,
        "least_coverage": None if statistics is None else statistics.least_coverage,
        "window_hours": None if needs is None else needs.window,
        "max_patients": reader.max_patients,
        "explains": ["none", *reader.explains],
        "variables": [] if needs is None else variables_with_units(needs.table),
    }


def text_of(reader: NoteReader, notes: Notes, row: int) -> dict[str, Any]:
    """What became of a text. read_until: the character at which reading ended."""
    text, longest = notes.texts[row], reader.trained.longest
    places = spans(text)
    tokens, read = len(places), places[:longest]
    until, is_cut = read[-1][1] if read else 0, tokens > longest
    reason = (
        f"the model reads {longest} tokens (words, digits and marks of punctuation) and the text has {tokens}: from "
        f"character {until} on nothing was read"
    )
    return {
        "characters": len(text),
        "tokens": tokens,
        "tokens_read": len(read),
        "read_until": until,
        "cut": is_cut,
        "cut_reason": reason if is_cut else None,
        "words": notes.counts[row].words,
        "known_words": notes.counts[row].known,
    }


def patients_of(reader: NoteReader, notes: Notes, asked: NotesRequest, deadline: Deadline) -> list[dict[str, Any]]:
    """The patients of a reply."""
    logits_NK = reader.logits(notes, deadline)
    told, found = reader.told(logits_NK), []
    guard = None
    if notes.series is not None and reader.trained.statistics is not None:
        guard = Coverage(reader.trained.statistics.least_coverage, notes.series.cohort.grid)
    wanted = asked.explain_labels or reader.trained.labels
    for row, name in enumerate(notes.ids):
        reasons = reader.reasons(notes.counts[row])
        if guard is not None:
            reasons += guard.reasons(float(guard.share_N[row]))
        explanations, why_not = [], None
        if asked.explain != "none" and not reasons:
            try:
                explanations.append(explained(reader, notes, row, asked.explain, wanted, deadline))
            except ValueError as error:
                why_not = str(error)
        patient = notes.patient(row)
        found.append(
            {
                "id": name,
                "status": NOT_ENOUGH if reasons else OK,
                "reasons": reasons,
                "text": text_of(reader, notes, row),
                "cutoff_hour": None if patient is None else patient.hours,
                "coverage": None if guard is None else guard.told(row),
                "measurements": None if patient is None else patient.account.to_dict(),
                "input_digest": notes.digest(row),
                "labels": [] if reasons else told[row],
                "words": words_of(reader, notes.texts[row]) if asked.explain != "none" else [],
                "explanations": explanations,
                "explanation_reason": why_not,
            }
        )
    return found


def reply(reader: NoteReader, notes: Notes, asked: NotesRequest, deadline: Deadline) -> dict[str, Any]:
    """The whole reply."""
    return {**head(reader), "patients": patients_of(reader, notes, asked, deadline)}
