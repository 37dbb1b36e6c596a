"""Reads csv tables, plain or gzip, row by row; errors name the file, the line, the field and the value."""

import csv
import gzip
import io
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from attnzoo.errors import suggest
from attnzoo.files import user_path

LONGEST = 366 * 24
"""The longest window: a year of hours."""
LARGEST = 2**53
"""The largest whole number of a table: up to it every one is a float64 too."""


@dataclass(frozen=True)
class TableRow:
    """One row of a table."""

    where: str
    """The file."""
    line: int
    fields: dict[str, str]

    def text(self, name: str) -> str:
        return self.fields[name].strip()

    def number(self, name: str) -> float:
        """A finite number; NaN for an empty field."""
        text = self.text(name)
        try:
            value = float(text) if text else math.nan
        except ValueError:
            value = math.inf
        if math.isinf(value) or (text and math.isnan(value)):
            raise self.error(name, "is no number")
        return value

    def integer(self, name: str) -> int:
        text = self.text(name)
        try:
            value = int(text)
        except ValueError:
            raise self.error(name, "is no whole number") from None
        if abs(value) > LARGEST:
            raise self.error(name, "is too large")
        return value

    def known(self, name: str) -> float:
        """As `number`, but an empty field is refused too."""
        value = self.number(name)
        if math.isnan(value):
            raise self.error(name, "is empty")
        return value

    def error(self, name: str, fault: str) -> ValueError:
        return ValueError(
            f"{self.where}, line {self.line}: {name}={self.fields[name]!r} {fault}; mend the row or remove it"
        )


def rows_of(path: Path, columns: tuple[str, ...], delimiter: str = ",") -> Iterator[TableRow]:
    """The rows of a table with at least these columns.

    Raises ValueError for a file that cannot be read, a column that is missing, and a row that is too short or too long.
    """
    try:
        with path.open("rb") as file:
            content = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
            yield from rows_in(str(path), cast(IO[bytes], content), columns, delimiter)
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, error) from None


def rows_in(where: str, content: IO[bytes], columns: tuple[str, ...], delimiter: str = ",") -> Iterator[TableRow]:
    """As `rows_of`, of an open file."""
    text = io.TextIOWrapper(content, encoding="utf-8-sig", newline="")
    reader = csv.DictReader(text, delimiter=delimiter, strict=True)
    try:
        names = reader.fieldnames or ()
        for column in columns:
            if column not in names:
                raise ValueError(f"{where} has no column {column!r}{suggest(column, names)}")
        for fields in reader:
            if None in fields or None in fields.values():
                raise ValueError(
                    f"{where}, line {reader.line_num}: a row of another length than the header's {len(names)} fields; "
                    "mend the row or remove it"
                )
            yield TableRow(where, reader.line_num, fields)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{where}, after line {reader.line_num}: {error}; copy the file again") from None


def find_table(directory: Path, name: str) -> Path | None:
    """NAME.csv or NAME.csv.gz in a directory; None if there is neither."""
    for suffix in (".csv", ".csv.gz"):
        if (directory / f"{name}{suffix}").is_file():
            return directory / f"{name}{suffix}"
    return None


def existing(path: str | Path, what: str) -> Path:
    """The path of a data set. Raises ValueError if nothing stands there."""
    found = user_path(path, what)
    if not found.exists():
        raise ValueError(f"{what}={str(path)!r} does not exist; give the path of the data set in its original format")
    return found


def check_hours(hours: int, what: str = "hours", most: int = LONGEST) -> None:
    """Raises ValueError unless `hours` is a whole number from 1 to `most`."""
    if isinstance(hours, bool) or not isinstance(hours, int) or not 1 <= hours <= most:
        raise ValueError(f"{what}={hours!r} is no length of the window; give a whole number from 1 to {most}")


def unreadable(path: Path, error: Exception) -> ValueError:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    if str(error).startswith("file could not be opened successfully"):  # tarfile lists what every method said
        reason = "it is no archive of tar, gzip, bzip2 or xz"
    return ValueError(f"{path} cannot be read ({' '.join(reason.split())}); is it the right file? else copy it again")
