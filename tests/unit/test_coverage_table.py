"""The table of `make coverage`."""

import json

from scripts.coverage_table import main


def test_lines_are_summed_by_package(tmp_path, capsys):
    counts = {
        "attnzoo/ops/a.py": (10, 9),
        "attnzoo/ops/b/c.py": (30, 11),
        "attnzoo/types.py": (5, 5),
        "serve/x.py": (0, 0),
    }
    files = {path: {"summary": {"num_statements": n, "covered_lines": m}} for path, (n, m) in counts.items()}
    (tmp_path / "coverage.json").write_text(json.dumps({"files": files}))
    assert main([str(tmp_path / "coverage.json")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["package", "statements", "run", "percent"]
    assert lines[2:] == [
        ["attnzoo/ops", "40", "20", "50"],
        ["attnzoo/types", "5", "5", "100"],
        ["all", "45", "25", "56"],
    ]


def test_what_is_no_report_is_named(tmp_path, capsys):
    (tmp_path / "coverage.json").write_text("{}")
    for words in ([], [str(tmp_path / "none.json")], [str(tmp_path / "coverage.json")]):
        assert main(words) == 2
        assert "coverage.json" in capsys.readouterr().err or "none.json" in words[0]
