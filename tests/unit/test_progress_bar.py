"""Progress bars: one line that is rewritten on a terminal, lines of their own elsewhere."""

import io
import sys

from tqdm import tqdm

from train import bar
from train.bar import Bar


def test_a_log_has_lines_and_no_returns_to_the_start(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(bar, "LOG_SECONDS", 0.0)
    with Bar(total=3, desc="try", unit="step") as steps:
        for step in range(3):
            steps.update()
            if step == 1:
                tqdm.write("validation 1.5", file=sys.stderr)
    text = log.getvalue()
    assert "\r" not in text
    lines = [line for line in text.split("\n") if line]
    assert lines[0].startswith("try:   0%")
    assert lines[-1].startswith("try: 100%")
    assert "3/3" in lines[-1]
    assert lines.count("validation 1.5") == 1
    assert len(lines) == 6, lines  # each step, the state at first and at last, and the message


def test_a_log_is_quiet_between(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with Bar(total=1000) as steps:
        for _ in range(1000):
            steps.update()
    assert len([line for line in log.getvalue().split("\n") if line]) == 2


def test_a_terminal_has_one_line(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with Bar(total=3, mininterval=0) as steps:
        for _ in range(3):
            steps.update()
    assert screen.getvalue().count("\r") >= 3
    assert screen.getvalue().count("\n") == 1
