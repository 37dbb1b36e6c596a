"""What a clinical run says of itself: the files of its directory, read for its cards without loading the model."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnzoo.checkpoint.model_files import WEIGHTS
from attnzoo.clinical.formats import row_name
from attnzoo.errors import suggest
from attnzoo.files import read_object, read_text
from attnzoo.settings import read_mapping

MODEL, REPORT, SETTINGS, RECORDS, STATISTICS = (
    "config.json",
    "training.json",
    "config.yaml",
    "metrics.jsonl",
    "statistics.json",
)
CLINICAL = ("data", "split", "metadata")
"""Keys of an export's config.json that every clinical task writes, and no other."""
PRETRAINING = "clinical-pretraining"
UNKNOWN = "unknown: the run does not say"


@dataclass(frozen=True)
class RunFacts:
    """The files of a run. export: its config.json. report: training.json, row its only row. settings: config.yaml.
    statistics: {} where the export has none. records: of metrics.jsonl. digests: SHA-256 of the export's files."""

    directory: Path
    export: dict[str, Any]
    report: dict[str, Any]
    settings: dict[str, Any]
    statistics: dict[str, Any]
    records: list[dict[str, Any]]
    digests: dict[str, str]

    @property
    def row(self) -> dict[str, Any]:
        """The run's row of training.json."""
        rows = self.report.get("rows") or [{}]
        return dict(rows[0])

    @property
    def data(self) -> dict[str, Any]:
        """What training.json says of the data."""
        return dict(self.row.get("data") or {})

    def section(self, name: str) -> dict[str, Any]:
        """A section of the configuration."""
        return dict(self.settings.get(name) or {})

    @property
    def outcome(self) -> str:
        """What is predicted, by name."""
        labels = self.export.get("labels") or dict(dict(self.export.get("questions") or {}).get("questions") or {})
        if labels:
            return ", ".join(map(str, labels))
        return str(dict(self.export.get("outcome") or {}).get("label") or UNKNOWN)

    @property
    def of_row(self) -> str:
        """What a row of the data set is: a stay, a dialogue, a day."""
        return row_name(str(self.export["data"].get("format")))

    @property
    def step(self) -> str:
        """What a step of the grid is: an hour, or a day."""
        return "day" if self.of_row == "day" else "hour"

    @property
    def reads_texts(self) -> bool:
        """Whether the model reads texts: its export says how many tokens of one."""
        return "longest" in self.export

    @property
    def reads_sensors(self) -> bool:
        """Whether the model reads daily sensors in front of a language model: its export says what it is asked."""
        return "questions" in self.export

    @property
    def reads_series(self) -> bool:
        """Whether the model reads cells of a grid; a model of texts does where it has statistics of them."""
        return not self.reads_sensors and (bool(self.statistics) or not self.reads_texts)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluations on the inner validation part."""
        return [record for record in self.records if record.get("kind") == "eval"]


def read_run(directory: Path) -> RunFacts:
    """Reads a run's directory. Raises ValueError that says what is missing or damaged, and for a run that is not of a
    clinical task."""
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory; name the run directory that training has written")
    export = directory / "export"
    missing = next((name for name in (MODEL, WEIGHTS) if not (export / name).is_file()), None)
    if missing is not None:
        there = (
            "it is an export: name the run directory above it" if (directory / MODEL).is_file() else "train it first"
        )
        raise ValueError(f"{directory} has no export/{missing}: a card is written of a finished run; {there}")
    content = read_object(export / MODEL)
    if not all(isinstance(content.get(key), dict) for key in CLINICAL):
        raise ValueError(
            f"{directory} is not a clinical run: {export / MODEL} does not say which stays it learned from (keys "
            f"{', '.join(CLINICAL)}); cards are written of runs whose task.kind is clinical, ldam or sensor-lm"
        )
    try:
        report = read_object(directory / REPORT)
        settings, _ = read_mapping(directory / SETTINGS)
    except FileNotFoundError as error:
        raise ValueError(
            f"{directory} has no {REPORT} ({error}); finish the run: the same command resumes it"
        ) from None
    with damage(directory):
        kind = dict((settings or {}).get("task") or {}).get("kind")
    if kind == PRETRAINING:
        raise ValueError(f"{directory}: task.kind={kind} predicts nothing yet; name a run that began with its export")
    statistics = read_object(export / STATISTICS) if (export / STATISTICS).is_file() else {}
    files = sorted(path for path in export.iterdir() if path.is_file())
    digests = {f"export/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return RunFacts(directory, content, report, settings or {}, statistics, _records(directory / RECORDS), digests)


@contextmanager
def damage(directory: Path) -> Iterator[None]:
    """What goes wrong while the files of a run are told is a ValueError that says that they are damaged."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{directory} is damaged: its files do not hold what training writes there ({reason}); copy it again"
        ) from None


def _records(path: Path) -> list[dict[str, Any]]:
    """Records of metrics.jsonl; none where there is no such file."""
    try:
        lines = read_text(path).splitlines()
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # the last line of a run that was killed
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def read_answers(path: Path, known: Mapping[str, object]) -> dict[str, str]:
    """Answers to items by number, from a YAML file. Raises ValueError that names the file and the key."""
    values, _ = read_mapping(path)
    found = {}
    for key, value in (values or {}).items():
        if str(key) not in known:
            raise ValueError(f"{path}: item {key!r} is none of TRIPOD+AI's{suggest(str(key), known)}")
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{path}: the answer to item {key} is {value!r}; write a text, or leave the item out")
        found[str(key)] = " ".join(value.split())
    return found
