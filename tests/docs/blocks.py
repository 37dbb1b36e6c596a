"""The code blocks of the documents, and how tests treat them.

A comment on the line above a fence says what is done with the block beyond the usual:

    (nothing)                   Python runs in every test run; commands are checked: options, files, keys, names
    <!-- test: run -->          these commands are quick: they run in every test run
    <!-- test: slow -->         runs with the slow tests only, in order with all other blocks of its page that run
    <!-- test: never, REASON -->   commands are checked, nothing runs
    <!-- test: before
    PYTHON -->                  runs before the Python block below, and readers do not see it
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if path.name != "lab-notes.md"),
]
LANGUAGES = ("python", "sh", "text", "yaml", "json")
FENCE = re.compile(
    r"(?:^<!-- test: (?P<mark>(?:(?!-->).)*?)\s*-->\n)?"
    r"^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
MARK = re.compile(r"run|slow|never, (?P<reason>\S.+)|before\n(?P<before>.+)", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block. line: of its first line of code. mode: "", "run", "slow" or "never". before: hidden Python."""

    page: Path
    line: int
    language: str
    code: str
    mode: str
    before: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All blocks of a page. Raises ValueError for a fence without a known language, and for an unknown mark."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        line = text[: match.start("code")].count("\n") + 1
        where = f"{page.relative_to(ROOT)}:{line}"
        mark = match["mark"] or ""
        known = MARK.fullmatch(mark)
        if mark and not known:
            raise ValueError(f"{where}: <!-- test: {mark} --> is none of run, slow, 'never, REASON' and before")
        if match["language"] not in LANGUAGES:
            raise ValueError(f"{where}: the fence says {match['language']!r}; give one of {', '.join(LANGUAGES)}")
        before = (known["before"] or "") if known else ""
        mode = "" if before else re.split(r"[,\s]", mark)[0]
        found.append(Block(page, line, match["language"], match["code"], mode, before))
    if text.count("```") != 2 * len(found) + text.count("`````"):
        raise ValueError(f"{page.relative_to(ROOT)}: a fence is not closed, or stands where it is not found")
    return found


def commands(block: Block) -> list[str]:
    """The commands of a block, each in one line, without comments."""
    joined = re.sub(r"\\\n\s*", " ", block.code)
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.strip().startswith("#")]
