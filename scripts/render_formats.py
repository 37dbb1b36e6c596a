"""The page docs/reference/data-formats.md: what each data format reads, from the readers themselves."""

import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

from attnzoo.clinical.definitions import SECTIONS
from attnzoo.clinical.formats import FORMATS, eicu, mimic, physionet2012, pmdata, yaib
from attnzoo.clinical.variables import MIMIC3, PHYSIONET2012, PMDATA, STATICS, YAIB, Table, Variable

TABLES: dict[str, Mapping[str, Table]] = {
    "physionet2012": {"PhysioNet 2012": PHYSIONET2012},
    "yaib": {"YAIB": YAIB},
    "eicu": {"YAIB": YAIB},
    "pmdata": {"PMData": PMDATA},
    "mimic": {"MIMIC-III": MIMIC3},
    "fhir": {"PhysioNet 2012": PHYSIONET2012, "YAIB": YAIB},
}
"""The tables of variables that formats name theirs by; one without has none."""
PLACES = {
    "physionet2012": "set-a.tar.gz",
    "yaib": "data/mortality24/hirid",
    "eicu": "eicu-collaborative-research-database",
    "pmdata": "pmdata.tar.gz",
    "mimic": "in-hospital-mortality/train",
    "fhir": "bundles",
    "mts_dialog": "mts_dialog",
}
"""What `data.path` looks like."""

RUNS = {
    "physionet2012": "tscan-mortality.yaml",
    "yaib": "tscan-mortality.yaml data.hours=24 model.chunks=2",
    "eicu": "tscan-mortality.yaml task.split=patient",
    "pmdata": "phllm-pro.yaml",
    "mimic": "tscan-mortality.yaml task.split=patient",
    "fhir": "tscan-mortality.yaml task.split=patient",
    "mts_dialog": "ldam-sections.yaml",
}
"""A configuration that trains on data of the format, and what has to be set in it beside the data."""


def run_of(name: str) -> str:
    """A command that trains a model on data of a format."""
    config, _, others = RUNS[name].partition(" ")
    words = ["--config", config, f"data.format={name}", f"data.path={PLACES[name]}", *others.split()]
    return f"deepspeed train/main.py {' '.join(words)}"


def columns() -> dict[str, dict[str, Sequence[str]]]:
    """Columns by file, of formats whose files are tables; * stands for those that the variables name."""
    outcomes = (physionet2012.RECORD, physionet2012.DEATH, physionet2012.STAY_DAYS)
    texts = {name: (eicu.STAY, *found) for name, found in eicu.TEXTS.items()}
    vitals = {name: (eicu.STAY, "observationoffset", *found) for name, found in eicu.VITALS.items()}
    return {
        "physionet2012": {
            "NUMBER.txt": physionet2012.HEADER.decode().split(","),
            "Outcomes-*.txt": outcomes,
        },
        "yaib": {
            "dyn.parquet": (yaib.STAY, yaib.TIME, "*"),
            "sta.parquet": (yaib.STAY, *yaib.STATICS),
            "outc.parquet": (yaib.STAY, f"{yaib.TIME} (of hourly labels)", yaib.LABEL),
        },
        "eicu": {
            "patient": eicu.PATIENT_COLUMNS,
            "lab": eicu.LAB_COLUMNS,
            **{f"{name} (if present)": found for name, found in vitals.items()},
            **{f"{name} (with `texts`)": found for name, found in texts.items()},
        },
        "mimic": {
            "listfile.csv": (mimic.STAY, f"{mimic.PERIOD} (of hourly labels)", f"{mimic.LABEL} or several labels"),
            "SUBJECT_episodeNUMBER_timeseries.csv": (mimic.HOURS, "*"),
        },
        "mts_dialog": {"TrainingSet.csv, ValidationSet.csv": ("ID", "section_header", "dialogue")},
        "pmdata": {"pNN/pmsys/wellness.csv": ("effective_time_frame", *pmdata.QUESTIONS)},
    }


def page() -> str:
    """The whole page."""
    return "".join(_parts())


def _parts() -> Iterator[str]:
    yield "# Data formats\n\nThis page is written by `python scripts/render_reference.py` from the readers in "
    yield "`attnzoo/clinical/formats`. A format is chosen by `data.format` of a training configuration or by "
    yield "`load_cohort(format, path)` of `attnzoo.clinical.formats`; the options below are the other keys of `data`. "
    yield "Severity scores, outcomes and record numbers are refused as variables.\n"
    of_files = columns()
    for name in FORMATS:
        yield f"\n## {name}\n\n{_prose(sys.modules[FORMATS.get(name).__module__].__doc__)}\n\n"
        yield f"A model on it: `{run_of(name)}`.\n\n"
        yield f"{_prose(FORMATS.get(name).__doc__)}\n\n{_table(('option', 'type', 'default'), _options(name))}"
        if name in of_files:
            rows = [(f"`{file}`", ", ".join(f"`{one}`" for one in found)) for file, found in of_files[name].items()]
            yield f"\n{_table(('file', 'columns'), rows)}"
        if name in TABLES:
            links = " or ".join(f"[{one}](#variables-of-{_anchor(one)})" for one in TABLES[name])
            yield f"\nVariables: {links}.\n"
        if name == "mts_dialog":
            yield f"\nLabels: {', '.join(f'`{label}`' for label in SECTIONS)}.\n"
    yield "\n## Facts about a patient\n\n"
    yield _table(("name", "meaning", "unit", "plausible", "possible"), [_row(row) for row in STATICS.values()])
    for title, table in {"PhysioNet 2012": PHYSIONET2012, "YAIB": YAIB, "MIMIC-III": MIMIC3, "PMData": PMDATA}.items():
        yield f"\n## Variables of {title}\n\nA cohort holds each in the unit that stands here; a value outside the "
        yield "possible range is dropped, one outside the plausible range is clipped to it.\n\n"
        yield _table(("name", "meaning", "unit", "plausible", "possible"), [_row(row) for row in table.values()])


def _row(row: Variable) -> tuple[str, ...]:
    codes = "; ".join(f"{code} {meaning}" for code, meaning in row.categories)
    ends = (f"{low:g} to {high:g}" for low, high in (row.plausible, row.possible))
    return (f"`{row.name}`", row.meaning + (f" ({codes})" if codes else ""), f"`{row.unit}`", *ends)


def _options(name: str) -> Iterator[tuple[str, str, str]]:
    """(option, type, default) of a format."""
    for option in inspect.signature(FORMATS.get(name)).parameters.values():
        if option.kind is option.KEYWORD_ONLY:
            kind = getattr(option.annotation, "__name__", "") if isinstance(option.annotation, type) else ""
            yield f"`{option.name}`", f"`{kind or option.annotation}`", f"`{option.default!r}`"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _prose(text: str | None) -> str:
    """A docstring, its paragraphs one line each."""
    return "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(text or "").split("\n\n"))


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")
