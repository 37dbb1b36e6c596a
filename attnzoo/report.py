"""Reports: the one JSON schema of every measurement, with the command, the machine, the results and the claims."""

import io
import json
import math
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from attnzoo.errors import OutputError, complain, harmless
from attnzoo.files import write_atomic

PACKAGES = ("attnzoo", "torch", "deepspeed", "ray", "sentencepiece")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """An expected and a measured number. Whether the claim holds is always computed.

    kind "at_most": measured <= expected + tolerance; "at_least": measured >= expected - tolerance;
    "equal": |measured - expected| <= tolerance.
    """

    name: str
    expected: float
    measured: float
    tolerance: float = 0.0
    kind: Literal["at_most", "at_least", "equal"] = "at_most"

    @property
    def holds(self) -> bool:
        """Whether the measurement meets the claim; False if it is NaN."""
        if self.kind == "at_most":
            return self.measured <= self.expected + self.tolerance
        if self.kind == "at_least":
            return self.measured >= self.expected - self.tolerance
        return abs(self.measured - self.expected) <= self.tolerance


@dataclass(kw_only=True)
class Report:
    """The results of a measurement. Call `start` before it (to read the machine's load), fill in rows and claims, then
    `write`. load_before: load average over one minute at the start."""

    command: list[str]
    commit: str
    seed: int
    device: str
    load_before: float
    versions: dict[str, str]
    quick: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)

    @classmethod
    def start(cls, *, command: list[str] | None = None, seed: int = 0, quick: bool = False) -> "Report":
        """A report of this process. quick: sizes were reduced, so that the numbers are no measurement."""
        return cls(
            command=this_command() if command is None else [_named(word) for word in command],
            commit=_commit(),
            seed=seed,
            device=_device(),
            load_before=round(os.getloadavg()[0], 2),
            versions=_versions(),
            quick=quick,
        )

    def to_dict(self) -> dict[str, Any]:
        """The content as plain JSON types, each claim with its `holds`."""
        content = asdict(self)
        content["claims"] = [{**asdict(claim), "holds": claim.holds} for claim in self.claims]
        return content

    def write(self, path: Path) -> None:
        """Writes JSON atomically; NaN and infinity, which JSON cannot express, become null."""
        content = json.dumps(_finite(self.to_dict()), indent=2, allow_nan=False)
        write_atomic(Path(path), (content + "\n").encode())

    def print_table(self) -> None:
        """Prints rows and claims as aligned text."""
        if self.rows:
            print(format_table(self.rows))
        if self.claims:
            print(format_claims(self.claims))
        note = " (quick: sizes cut down, not a measurement)" if self.quick else ""
        print(f"{self.device}, load before {self.load_before}, commit {self.commit}{note}")

    def exit_status(self) -> int:
        """0 when every claim holds, 1 otherwise."""
        return 0 if all(claim.holds for claim in self.claims) else 1


def _finite(value: Any) -> Any:
    """`value` with null for every NaN and infinity in it."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_table(rows: list[dict[str, Any]]) -> str:
    """Formats rows as aligned columns, one for each key; columns of numbers are aligned right."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[format_value(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
    numeric = [all(isinstance(row.get(column, 0), int | float) for row in rows) for column in columns]

    def line(texts: list[str]) -> str:
        padded = (
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(texts, widths, numeric, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(columns), line(["-" * width for width in widths]), *map(line, cells)])


def format_claims(claims: list[Claim]) -> str:
    """A table of what was expected, what was measured, and whether it holds."""
    return format_table([_claim_row(claim) for claim in claims])


def counted(count: int, one: str, many: str | None = None) -> str:
    """A count with its noun: "1 rank", "2 ranks". many: the plural, if it is not `one` with an s."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def run_command(main: Callable[[], int]) -> int:
    """Runs a command and returns its exit status. A closed pipe on stdout (`| head`) ends it without an error; where
    stdout cannot be written otherwise, that is its error, with status 1."""
    _name_stdout()
    try:
        try:
            status = main()
        finally:  # --help ends by SystemExit
            sys.stdout.flush()
    except (BrokenPipeError, OutputError) as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        if isinstance(error, BrokenPipeError):
            return 128 + signal.SIGPIPE
        return complain("attnzoo", f"stdout cannot be written: {error.strerror}", status=1)
    return status


class _Stdout(io.FileIO):
    """A descriptor whose errors say that it is stdout: nobody could tell them from those of files."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(error.errno, error.strerror) from None


def _name_stdout() -> None:
    """Makes `sys.stdout` raise OutputError where the process has a stdout of its own, with a buffer or, as under
    PYTHONUNBUFFERED, without one."""
    out = sys.stdout
    if not isinstance(out, io.TextIOWrapper):
        return
    buffer: Any = out.buffer
    unbuffered = isinstance(buffer, io.FileIO)
    if not unbuffered and not isinstance(getattr(buffer, "raw", None), io.FileIO):
        return
    out.flush()
    raw = _Stdout(out.fileno(), "w", closefd=False)
    writer: Any = raw if unbuffered else io.BufferedWriter(raw)
    sys.stdout = io.TextIOWrapper(
        writer,
        out.encoding,
        out.errors,
        line_buffering=out.line_buffering or raw.isatty(),
        write_through=out.write_through,
    )


def format_value(value: Any) -> str:
    """A value as text for tables, on the console and in documents: four significant digits, thousands separators."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:z.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else harmless(str(value))


def _claim_row(claim: Claim) -> dict[str, Any]:
    expected = f"{claim.kind.replace('_', ' ')} {format_value(claim.expected)}"
    if claim.kind == "equal":
        expected += f" ± {format_value(claim.tolerance)}"
    elif claim.tolerance:
        expected += f" {'+' if claim.kind == 'at_most' else '-'} {format_value(claim.tolerance)}"
    return {
        "claim": claim.name,
        "expected": expected,
        "measured": claim.measured,
        "holds": "yes" if claim.holds else "NO",
    }


def this_command() -> list[str]:
    """The command line of this process without absolute paths: `python -m module ...`, or the script's path relative to
    the working directory (only its name if it lies elsewhere, as installed commands do); of files and directories that
    are given as absolute paths, the names."""
    words = [_named(word) for word in sys.argv[1:]]
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:  # sys.argv[0] is then the full path of the module's file
        return ["python", "-m", spec.name.removesuffix(".__main__"), *words]
    script = Path(sys.argv[0])
    if script.is_absolute():
        inside = script.is_relative_to(Path.cwd())
        script = script.relative_to(Path.cwd()) if inside else Path(script.name)
    return [*(["python"] if script.suffix == ".py" else []), str(script), *words]


def _named(word: str) -> str:
    """A word of a command line; only the last part of an absolute path, or of that after `=`."""
    before, equals, path = word.rpartition("=")
    return before + equals + Path(path).name if path.startswith("/") else word


def _commit() -> str:
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip()


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"CPU {_processor()}, {available_cores()} cores"


def available_cores() -> int:
    """Number of CPU cores that this process may use; on systems that do not say (macOS), all cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
