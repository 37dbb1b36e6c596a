"""Reports: whether a claim holds is computed, and the file says where numbers come from."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnzoo.report import Claim, Report, available_cores, format_claims, format_table
from scripts.render_tables import markdown


@pytest.mark.parametrize(
    ("kind", "measured", "holds"),
    [
        ("at_most", 2.05, True),
        ("at_most", 2.2, False),
        ("at_least", 1.95, True),
        ("at_least", 1.8, False),
        ("equal", 2.1, True),
        ("equal", 1.8, False),
        ("at_most", math.nan, False),
        ("at_least", math.nan, False),
        ("equal", math.nan, False),
    ],
)
def test_claim(kind, measured, holds):
    assert Claim(name="c", expected=2.0, measured=measured, tolerance=0.125, kind=kind).holds is holds


def test_report_file(tmp_path, capsys):
    report = Report.start(command=["bench", "--quick"], seed=3, quick=True)
    report.rows.append({"name": "a", "value": 1.5})
    report.claims.append(Claim(name="fast", expected=1.0, measured=2.0))
    report.write(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    expected = {"command", "commit", "seed", "device", "load_before", "versions", "quick", "rows", "claims", "figures"}
    assert set(content) == expected
    assert content["claims"] == [
        {"name": "fast", "expected": 1.0, "measured": 2.0, "tolerance": 0.0, "kind": "at_most", "holds": False}
    ]
    assert report.exit_status() == 1
    report.claims.clear()
    assert report.exit_status() == 0
    report.print_table()
    assert "not a measurement" in capsys.readouterr().out


def test_what_is_not_finite_is_null_in_the_file(tmp_path):
    report = Report.start(command=["bench"])
    report.rows.append({"loss": math.nan, "parts": [math.inf, 1.0], "step": 3})
    report.claims.append(Claim(name="c", expected=1.0, measured=-math.inf, kind="at_least"))
    report.write(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    assert not any(word in text for word in ("NaN", "Infinity"))
    content = json.loads(text)
    assert content["rows"] == [{"loss": None, "parts": [None, 1.0], "step": 3}]
    assert content["claims"][0]["measured"] is None
    assert content["claims"][0]["holds"] is False


def test_a_table_of_claims_shows_tolerances_and_numbers_as_documents_do():
    claims = [
        Claim(name="bytes", expected=1327168, measured=1327168, kind="equal"),
        Claim(name="ratio", expected=1.5, measured=2.0, tolerance=0.25, kind="equal"),
        Claim(name="loss", expected=2.0, measured=2.05, tolerance=0.1),
        Claim(name="rate", expected=12345.6, measured=12300.2, tolerance=100.0, kind="at_least"),
    ]
    lines = [line.split("  ") for line in format_claims(claims).splitlines()[2:]]
    assert [[cell.strip() for cell in line if cell] for line in lines] == [
        ["bytes", "equal 1,327,168 ± 0", "1,327,168", "yes"],
        ["ratio", "equal 1.5 ± 0.25", "2", "NO"],
        ["loss", "at most 2 + 0.1", "2.05", "yes"],
        ["rate", "at least 12,346 - 100", "12,300", "yes"],
    ]
    row = {"a": True, "b": 1327168, "c": 1327168.25, "d": 0.123456, "e": "x"}
    shown = format_table([row]).splitlines()[2].split()
    assert markdown([row]).splitlines()[2] == f"| {' | '.join(shown)} |"


def test_command_holds_no_path_of_a_machine(tmp_path):
    """A module, a package, a script by its relative and its full path, and one from elsewhere, each really started."""
    text = "from attnzoo.report import this_command; print(this_command())"
    (tmp_path / "tools" / "whole").mkdir(parents=True)
    for name in ("tools/bench.py", "tools/whole/__main__.py"):
        (tmp_path / name).write_text(text)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    cases = [
        (tmp_path, ["-m", "tools.bench", "--quick"], ["python", "-m", "tools.bench", "--quick"]),
        (tmp_path, ["-X", "dev", "-m", "tools.whole", "a"], ["python", "-m", "tools.whole", "a"]),
        (tmp_path, ["tools/bench.py", "-m", "b"], ["python", "tools/bench.py", "-m", "b"]),
        (tmp_path, [str(tmp_path / "tools/bench.py")], ["python", "tools/bench.py"]),
        (elsewhere, [str(tmp_path / "tools/bench.py")], ["python", "bench.py"]),
        (
            tmp_path,
            ["tools/bench.py", "--data", "/a/set", "--out=/b/c/", "../d", "e/f", "k=/g"],
            ["python", "tools/bench.py", "--data", "set", "--out=c", "../d", "e/f", "k=g"],
        ),
    ]
    root = str(Path(__file__).resolve().parents[2])
    for folder, arguments, expected in cases:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": root, "PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == str(expected)


def test_a_system_that_does_not_say_which_cores_are_ours(monkeypatch):
    """macOS has no sched_getaffinity, and asking for it ended every report."""
    monkeypatch.delattr(os, "sched_getaffinity")
    assert available_cores() == os.cpu_count()
    assert Report.start(command=["bench"]).device


def test_one_function_asks_for_cores():
    """Whoever else asks for them forgets the systems that do not say."""
    root = Path(__file__).resolve().parents[2]
    places = [root / name for name in ("attnzoo", "train", "serve", "scripts")]
    asking = [
        path for place in places for path in place.rglob("*.py") if "sched_getaffinity" in path.read_text("utf-8")
    ]
    assert asking == [root / "attnzoo" / "report.py"]


def test_table():
    rows = [{"name": "a", "count": 1200}, {"name": "long", "count": 7, "more": 0.12345}]
    assert format_table(rows).splitlines() == [
        "name  count    more",
        "----  -----  ------",
        "a     1,200",
        "long      7  0.1235",
    ]


def test_a_report_names_no_directory_of_this_machine():
    words = ["attnzoo", "reproduce", "tscan", "--data", "../set-a.tar.gz", "--results", "/data/results", "a=/b/c"]
    started = Report.start(command=words)
    assert started.command == [*words[:6], "results", "a=c"]
