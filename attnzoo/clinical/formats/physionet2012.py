"""PhysioNet/CinC Challenge 2012: one text file a stay (a tar archive or a directory), and a file of outcomes beside it.

https://physionet.org/content/challenge-2012/1.0.0/ . A RecordID names a stay of at least 48 hours. The data set does
not say which stays are of one patient. -1 stands for what is unknown.
"""

import tarfile
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from attnzoo.clinical.cohort import Cohort, StayFacts, cohort_of
from attnzoo.clinical.events import Events
from attnzoo.clinical.formats.tables import check_hours, existing, rows_of, unreadable
from attnzoo.clinical.store import Arrays, cached, digest_of
from attnzoo.clinical.units import convert
from attnzoo.clinical.variables import PHYSIONET2012, choose
from attnzoo.errors import suggest

VERSION = "physionet2012 1"
"""Changes when the parsed arrays do."""
STAY_HOURS = 48
HEADER = b"Time,Parameter,Value"
STATICS = {"age": "Age", "sex": "Gender", "height": "Height", "weight": "Weight", "icu_type": "ICUType"}
DESCRIPTORS = ("RecordID", "Age", "Gender", "Height", "ICUType")
"""Written once, at 00:00, beside the first Weight."""
CODES = {name.encode(): code for code, name in enumerate((*PHYSIONET2012, *DESCRIPTORS))}
FIRST_DESCRIPTOR = len(PHYSIONET2012)
MINUTES = {f"{hour:02d}:{minute:02d}".encode(): 60 * hour + minute for hour in range(100) for minute in range(60)}
RECORD, DEATH, STAY_DAYS = "RecordID", "In-hospital_death", "Length_of_stay"


def load(
    path: str | Path,
    *,
    outcomes: str | Path | None = None,
    hours: int = STAY_HOURS,
    variables: tuple[str, ...] | None = None,
    cache: Path | None = None,
) -> Cohort:
    """The cohort in an archive (.tar, .tar.gz) or a directory of NUMBER.txt files.

    outcomes: the file of outcomes; None: Outcomes-*.txt beside the records, and without such a file no labels. Labels:
    "mortality" (death in hospital), "los_days" (length of the hospital stay). variables: a choice of the 37. cache: the
    directory that keeps the parsed records. Raises ValueError that names file, line and value.
    """
    check_hours(hours, most=STAY_HOURS)
    table = choose(PHYSIONET2012, variables, "variables")
    records = existing(path, "path")
    sources = [records] if records.is_file() else _text_files(records)
    arrays = cached(cache, lambda: digest_of(sources, VERSION), lambda: parse(records, _texts(records, sources)))
    stays = len(arrays["records"])
    chosen = np.array([list(PHYSIONET2012).index(name) for name in table])
    place = np.full(len(PHYSIONET2012), -1, np.int16)
    place[chosen] = np.arange(len(chosen))
    events = Events(arrays["stays"], arrays["minutes"], place[arrays["variables"]], arrays["values"])
    labels, left_out = _labels(_outcomes_file(records, outcomes), arrays["records"])
    facts = StayFacts(
        name=f"physionet2012 {records.name.partition('.')[0]}",
        hours_N=np.full(stays, hours),
        statics=dict(zip(STATICS, arrays["statics"].T, strict=True)),
        stay_ids=tuple(map(str, arrays["records"].tolist())),
        labels=labels,
        left_out=left_out,
    )
    return cohort_of(facts, events.where(events.variables_E >= 0), table, hours)


def parse(root: Path, texts: Iterator[tuple[str, int, bytes]]) -> Arrays:
    """Records, statics and events of (file name, record number, content) below `root`, by record number."""
    numbers: list[int] = []
    parts = []
    for where, number, text in sorted(texts, key=lambda item: item[1]):
        if numbers and numbers[-1] == number:
            raise ValueError(f"{where}: record {number} stands in the data set twice; keep one of the files")
        parts.append(_record(where, number, text))
        numbers.append(number)
    if not parts:
        raise ValueError(f"{root} holds no record; the files of records are called NUMBER.txt")
    lengths = [len(values) for _, _, values in parts]
    stays = np.repeat(np.arange(len(parts), dtype=np.int32), lengths)
    minutes, codes, values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return {
        "records": np.array(numbers, np.int64),
        "statics": _statics(stays, minutes, codes, values, len(parts)),
        **_events(stays, minutes, codes, values),
    }


def _events(stays: np.ndarray, minutes: np.ndarray, codes: np.ndarray, values: np.ndarray) -> Arrays:
    """Measurements without descriptors and without -1; inspired oxygen, a fraction in the files, as a percentage."""
    is_measured = (codes < FIRST_DESCRIPTOR) & (values != -1)
    fio2 = codes == CODES[b"FiO2"]
    values = values.copy()
    values[fio2] = convert(PHYSIONET2012["FiO2"], values[fio2], "1")
    return {
        "stays": stays[is_measured],
        "minutes": minutes[is_measured],
        "variables": codes[is_measured].astype(np.int16),
        "values": values[is_measured].astype(np.float32),
    }


def _statics(stays: np.ndarray, minutes: np.ndarray, codes: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """[N, S]: the first value at 00:00 of each; NaN for -1."""
    statics_NS = np.full((count, len(STATICS)), np.nan, np.float32)
    for column, name in enumerate(STATICS.values()):
        at = np.flatnonzero((codes == CODES[name.encode()]) & (minutes == 0))[::-1]  # the first is written last
        statics_NS[stays[at], column] = np.where(values[at] == -1, np.nan, values[at])
    return statics_NS


def _record(where: str, number: int, text: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(minutes, codes, values) of one file. Raises the ValueError of `_explain`."""
    tokens = text.removeprefix(BOM_UTF8).replace(b"\r\n", b"\n").rstrip(b"\n").replace(b"\n", b",").split(b",")
    try:
        minutes = np.array([MINUTES[token] for token in tokens[3::3]], np.int32)
        codes = np.array([CODES[token] for token in tokens[4::3]], np.int16)
        values = np.array([float(token) for token in tokens[5::3]])
    except (KeyError, ValueError):
        raise _explain(where, text) from None
    is_whole = len(minutes) == len(codes) == len(values) and b",".join(tokens[:3]) == HEADER
    if not is_whole or not np.isfinite(values).all():
        raise _explain(where, text)
    record = values[codes == CODES[RECORD.encode()]]
    if not len(record):
        raise ValueError(f"{where} has no line with the {RECORD}; is it a record?")
    if (record != number).any():
        raise ValueError(
            f"{where}: {RECORD} {record[record != number][0]:g} is not the number in the file's name; rename the file"
        )
    return minutes, codes, values


def _explain(where: str, text: bytes) -> ValueError:
    """Says which line of a record is wrong."""
    # The lines that `_record` sees: Python's own also end at a carriage return alone.
    lines = text.decode("utf-8-sig", "replace").replace("\r\n", "\n").rstrip("\n").split("\n")
    if lines[0].encode() != HEADER:
        return ValueError(f"{where}, line 1: {lines[0][:60]!r} is not the header {HEADER.decode()!r}; is it a record?")
    for number, line in enumerate(lines[1:], 2):
        fields = line.split(",")
        at = f"{where}, line {number}: "
        if len(fields) != 3:
            return ValueError(f"{at}{line!r} has {len(fields)} fields, not time, parameter and value; mend the line")
        time, name, value = fields
        if time.encode() not in MINUTES:
            return ValueError(f"{at}Time={time!r} is not hours and minutes as in 07:42; mend the line")
        if name.encode() not in CODES:
            return ValueError(f"{at}unknown Parameter {name!r}{suggest(name, [n.decode() for n in CODES])}")
        try:
            # Of bytes, as `_record` reads them: of a text, float takes digits of other scripts and their spaces, too.
            if np.isfinite(float(value.encode())):
                continue
        except ValueError:
            pass
        return ValueError(f"{at}{name}={value!r} is no number; mend the line or remove it")
    raise AssertionError(f"{where}: every line is right")


def _text_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if _number(path.name) is not None)


def _number(name: str) -> int | None:
    """The record number in a file's name."""
    stem, dot, suffix = name.partition(".")
    return int(stem) if stem.isascii() and stem.isdigit() and dot and suffix == "txt" else None


def _texts(records: Path, sources: list[Path]) -> Iterator[tuple[str, int, bytes]]:
    """(file name, record number, content) of every record."""
    try:
        if records.is_dir():
            for path in sources:
                yield str(path), _number(path.name) or 0, path.read_bytes()
            return
        with tarfile.open(records) as archive:
            for member in archive:
                number = _number(Path(member.name).name)
                if member.isfile() and number is not None:
                    file = archive.extractfile(member)
                    assert file is not None
                    yield f"{records}: {member.name}", number, file.read()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise unreadable(records, error) from None


def _outcomes_file(records: Path, outcomes: str | Path | None) -> Path | None:
    if outcomes is not None:
        return existing(outcomes, "outcomes")
    found = sorted(path for place in (records.parent, records) for path in place.glob("Outcomes-*.txt"))
    letter = records.name.partition(".")[0][-1:]  # set-a: Outcomes-a.txt
    own = [path for path in found if path.stem.endswith(f"-{letter}")] or found
    if len(own) > 1:
        names = ", ".join(str(path) for path in own)
        raise ValueError(f"outcomes=None, and {records} has several files of outcomes beside it; choose one of {names}")
    return own[0] if own else None


def _labels(path: Path | None, records: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """(labels of the records in their order, what was left out)."""
    if path is None:
        return {}, {}
    told: dict[int, tuple[float, float]] = {}
    for row in rows_of(path, (RECORD, DEATH, STAY_DAYS)):
        record, death, days = row.integer(RECORD), row.integer(DEATH), row.number(STAY_DAYS)
        if death not in (0, 1):
            raise row.error(DEATH, "is neither 0 nor 1")
        if record in told:
            raise row.error(RECORD, "stands in the file twice")
        told[record] = death, np.nan if days < 0 else days
    for record in records.tolist():
        if record not in told:
            raise ValueError(f"{path} has no outcome of record {record}; give the file that belongs to the records")
    outcome_N2 = np.array([told[record] for record in records.tolist()], np.float32)
    left_out = {"outcomes without a record": len(told) - len(records)}
    return {"mortality": outcome_N2[:, 0], "los_days": outcome_N2[:, 1]}, left_out
