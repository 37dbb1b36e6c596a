"""Lines that tests ran, per package, from a report of coverage in JSON; `make coverage` calls it.

python -m scripts.coverage_table .cache/coverage.json
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from attnzoo.errors import complain
from attnzoo.report import format_table


def rows_of(files: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a package, which is a folder or a file one level below attnzoo, train and serve; then all together."""
    sums: dict[str, list[int]] = {}
    for path, content in files.items():
        summary = content["summary"]
        for name in (PurePath(*PurePath(path).parts[:2]).as_posix().removesuffix(".py"), "all"):
            found = sums.setdefault(name, [0, 0])
            found[0] += summary["num_statements"]
            found[1] += summary["covered_lines"]
    order = sorted(name for name in sums if name != "all")
    return [
        {"package": name, "statements": total, "run": run, "percent": round(100 * run / total)}
        for name in [*order, *(["all"] if order else [])]
        for total, run in [sums[name]]
        if total
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if len(words) != 1:
        return complain("scripts.coverage_table", "give one file, for example .cache/coverage.json")
    try:
        files = json.loads(Path(words[0]).read_text(encoding="utf-8"))["files"]
        rows = rows_of(files)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return complain(
            "scripts.coverage_table", f"{words[0]} is no report of coverage in JSON ({error!r}); run make coverage"
        )
    print(format_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
