"""MTS-Dialog: dialogues of doctors and patients, each of them written for one section of a clinical note.

https://github.com/abachaa/MTS-Dialog (CC BY 4.0). A row is a dialogue, and there is one 0/1 label for each of the 20
sections, of which exactly one is 1. The note's own text (section_text) tells the section and is never read. Nothing
says which dialogues were written from the notes of one patient, so they can be split by dialogue alone (by="stay").
"""

from pathlib import Path

import numpy as np

from attnzoo.clinical.cohort import Cohort
from attnzoo.clinical.definitions import SECTIONS
from attnzoo.clinical.formats.tables import TableRow, existing, find_table, rows_of
from attnzoo.clinical.grid import Grid
from attnzoo.errors import suggest

PARTS = {"training": "TrainingSet", "validation": "ValidationSet"}
"""Files of the data set, with or without MTS-Dialog- before the name."""


def load(path: str | Path, *, parts: tuple[str, ...] = ("training", "validation")) -> Cohort:
    """The dialogues of the files in a directory. parts: which of them, "training" and "validation"; their names speak
    of the challenge they were made for, and together they are one data set here. Raises ValueError that names file,
    line, field and value."""
    directory, rows = existing(path, "path"), []
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"parts holds {part!r}{suggest(part, PARTS)}")
        file = find_table(directory, PARTS[part]) or find_table(directory, f"MTS-Dialog-{PARTS[part]}")
        if file is None:
            raise ValueError(
                f"{directory} has no {PARTS[part]}.csv or {PARTS[part]}.csv.gz; give MTS-Dialog's directory"
            )
        rows += [(part, row) for row in rows_of(file, ("ID", "section_header", "dialogue"))]
    if not rows:
        raise ValueError(f"{directory} has no dialogue in {', '.join(parts) or 'no part'}; give the files' parts")
    section_N = np.array([_section(row) for _, row in rows])
    none = np.zeros((len(rows), 0, 0))
    return Cohort(
        name=f"mts_dialog {directory.name}",
        grid=Grid(none.astype(np.float32), none.astype(np.uint8), np.zeros(len(rows), np.int64), ()),
        statics_NS=np.zeros((len(rows), 0), np.float32),
        statics=(),
        stay_ids=tuple(f"{part} {row.text('ID')}" for part, row in rows),
        patient_ids=None,
        labels={name: (section_N == name).astype(np.float32) for name in SECTIONS},
        texts=tuple(row.text("dialogue") for _, row in rows),
    )


def _section(row: TableRow) -> str:
    section = row.text("section_header").upper()
    if section not in SECTIONS:
        raise row.error("section_header", f"is no section{suggest(section, SECTIONS)}")
    if not row.text("dialogue"):
        raise row.error("dialogue", "is empty")
    return section
