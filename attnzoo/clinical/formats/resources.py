"""Reads FHIR R4 resources from JSON: bundles of any type, NDJSON, references between resources, and their times."""

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from attnzoo.clinical.formats.tables import unreadable

Node = dict[str, Any]
Document = tuple[str, Any]
"""(the place in a file, what JSON holds there): a bundle or a single resource."""
LINES, WHOLE = (".ndjson", ".jsonl"), (".json",)
_MOMENT = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]+)?)?(Z|[+-][0-9]{2}:[0-9]{2})?")
_DATE = re.compile(r"[0-9]{4}(-[0-9]{2}(-[0-9]{2})?)?")


def mapping(node: Any, *names: str) -> Node:
    """The object below a node under these names; an empty one where there is none."""
    for name in names:
        node = node.get(name) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else {}


def mappings(node: Any, name: str) -> list[Node]:
    """The objects of a list below a node; what is no object is left out."""
    found = node.get(name) if isinstance(node, dict) else None
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def codes_of(concept: Node, systems: tuple[str, ...]) -> set[str]:
    """The codes of a CodeableConcept in these systems. A coding without a system says nothing."""
    codings = [coding for coding in mappings(concept, "coding") if coding.get("system") in systems]
    return {coding["code"] for coding in codings if isinstance(coding.get("code"), str)}


@dataclass(frozen=True)
class Resource:
    """One resource of the data set."""

    where: str
    key: str
    """Its reference, "Observation/7" or the fullUrl of an entry without an id; its place where it has neither."""
    content: Node

    @property
    def is_referable(self) -> bool:
        return self.key != self.where


class Clock:
    """Reads times. Times without an offset from UTC are of the zone `tz`, and refused where that is None."""

    def __init__(self, tz: str | None) -> None:
        try:
            self.zone = None if tz is None else ZoneInfo(tz)
        except (ZoneInfoNotFoundError, ValueError, OSError, TypeError):
            raise ValueError(f"tz={tz!r} is no time zone; give a name as in Europe/Berlin or UTC") from None

    def moment(self, where: str, field: str, text: Any) -> datetime | None:
        """The time in UTC; None for what is no time, has no hour, or stands in the hour in which clocks change.

        Raises ValueError for a time without an offset where no zone is given.
        """
        time = _time(text)
        if time is None or time.tzinfo is not None:
            return time and _in_utc(time)
        if self.zone is None:
            raise ValueError(
                f"{where}: {field}={text!r} has no offset from UTC; say of which time zone such times are, for example "
                "tz='Europe/Berlin'"
            )
        time = time.replace(tzinfo=self.zone)
        return _in_utc(time) if time.utcoffset() == time.replace(fold=1).utcoffset() else None


def _time(text: Any) -> datetime | None:
    if not isinstance(text, str) or not _MOMENT.fullmatch(text):
        return None
    try:
        return datetime.fromisoformat(text)
    except ValueError:  # a month 13
        return None


def _in_utc(time: datetime) -> datetime | None:
    try:
        return time.astimezone(UTC)
    except OverflowError:  # at the ends of the calendar
        return None


def is_date(text: Any) -> bool:
    """Whether a FHIR dateTime has no hour."""
    return isinstance(text, str) and _DATE.fullmatch(text) is not None


class Resources:
    """The resources of some documents by type, one of each id: of several versions the last updated, else the last."""

    def __init__(self, documents: Iterable[Document], types: tuple[str, ...]) -> None:
        self.by_type: dict[str, dict[str, Resource]] = {name: {} for name in types}
        self.left_out: Counter[str] = Counter()
        self._keys: dict[str, str] = {}
        deleted: set[str] = set()
        for where, content in documents:
            self._add_all(where, content, deleted)
        for key in deleted:
            for resources in self.by_type.values():
                if resources.pop(key, None) is not None:
                    self.left_out["resources that were deleted later"] += 1

    def __getitem__(self, name: str) -> dict[str, Resource]:
        return self.by_type[name]

    def key_of(self, reference: Node) -> str | None:
        """The key of the resource that a Reference names; None for one that names none."""
        text = reference.get("reference")
        if not isinstance(text, str) or not text or text.startswith("#"):
            return None
        text = text.partition("/_history/")[0]
        short = "/".join(text.rsplit("/", 2)[-2:])
        return self._keys.get(text) or self._keys.get(short, short)

    def _add_all(self, where: str, content: Any, deleted: set[str]) -> None:
        pending: list[tuple[str, Any, Any]] = [(where, None, content)]
        while pending:
            where, url, content = pending.pop()
            if not isinstance(content, dict) or not isinstance(content.get("resourceType"), str):
                self.left_out["entries that are no resource"] += 1
            elif content["resourceType"] == "Bundle":
                entries = [(f"{where}, entry {i}", entry) for i, entry in enumerate(mappings(content, "entry"))]
                requests = [mapping(entry, "request") for _, entry in entries]
                deleted |= {str(request.get("url")) for request in requests if request.get("method") == "DELETE"}
                pending += [(at, e.get("fullUrl"), e["resource"]) for at, e in reversed(entries) if "resource" in e]
            else:
                self._add(where, url, content)

    def _add(self, where: str, url: Any, content: Node) -> None:
        name, own = content["resourceType"], content.get("id")
        if name not in self.by_type:
            self.left_out["resources of other types"] += 1
            return
        key = f"{name}/{own}" if isinstance(own, str) and own else url if isinstance(url, str) and url else where
        self._keys[key] = key
        if isinstance(url, str):
            self._keys[url] = key
        found = self.by_type[name].get(key)
        if found is not None:
            self.left_out[f"{name} resources that repeat an id"] += 1
        if found is None or _updated(content) >= _updated(found.content):
            self.by_type[name][key] = Resource(where, key, content)


def _updated(content: Node) -> datetime:
    time = _time(mapping(content, "meta").get("lastUpdated"))
    return (time and time.tzinfo and _in_utc(time)) or datetime.min.replace(tzinfo=UTC)


def documents_of(path: Path) -> Iterator[Document]:
    """The documents of a file or of all files of a directory, plain or gzip: .json, or .ndjson with one a line.

    Raises ValueError that names the file and the place for what is no JSON.
    """
    files = sorted(p for p in path.iterdir() if _kind(p)) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} holds no file of {', '.join(WHOLE + LINES)}, plain or with .gz; give FHIR's JSON")
    for file in files:
        kind = _kind(file)
        if not kind:
            raise ValueError(f"{file} is not called {', '.join(WHOLE + LINES)}, plain or with .gz; name it so")
        try:
            content = file.read_bytes()
            text = (gzip.decompress(content) if file.suffix == ".gz" else content).decode("utf-8-sig")
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise unreadable(file, error) from None
        if kind in WHOLE:
            yield str(file), _parsed(str(file), text)
        else:
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    yield f"{file}, line {number}", _parsed(f"{file}, line {number}", line)


def _kind(path: Path) -> str:
    """The ending of a file of FHIR; "" for other files."""
    ending = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    return ending if ending in LINES + WHOLE else ""


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON ({error}); copy the file again") from None
