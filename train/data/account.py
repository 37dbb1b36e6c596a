"""Counts the files and documents of a data source: read, skipped, duplicate or empty."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from attnzoo.report import counted

EXAMPLES = 3


@dataclass
class Account:
    """Counts of a data source while it is read. skipped: files not read, by reason; examples: names of some of them."""

    files: int = 0
    documents: int = 0
    duplicates: int = 0
    empty: int = 0
    complete: bool = True
    """False if data.max_bytes ended the reading."""
    skipped: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def skip(self, name: str, reason: str) -> None:
        """Counts a file that is not read."""
        self.skipped[reason] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(name)

    def to_dict(self) -> dict[str, Any]:
        """The counts as plain JSON types."""
        return {
            "files": self.files,
            "files_skipped": dict(sorted(self.skipped.items())),
            "examples": self.examples,
            "documents": self.documents,
            "duplicates": self.duplicates,
            "empty": self.empty,
            "complete": self.complete,
        }


def account_line(source: str, counts: dict[str, Any]) -> str:
    """The counts of `Account.to_dict` as one line of text."""
    skipped = counts["files_skipped"]
    reasons = "; ".join(f"{number:,} {reason}" for reason, number in skipped.items())
    names = f", such as {', '.join(map(repr, counts['examples']))}" if counts["examples"] else ""
    files = [
        f"{counted(counts['files'], 'file')} read",
        f"{sum(skipped.values()):,} skipped" + (f" ({reasons}{names})" if skipped else ""),
    ]
    parts = [
        *(files if counts["files"] else []),  # a hub data set has no files
        counted(counts["documents"], "document"),
        f"{counted(counts['duplicates'], 'duplicate')} and {counted(counts['empty'], 'empty one')} dropped",
    ]
    end = "" if counts["complete"] else "; ended by data.max_bytes"
    return f"data.source={source!r}: {', '.join(parts)}{end}"
