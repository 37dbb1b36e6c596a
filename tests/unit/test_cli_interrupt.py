"""Ctrl-C while Python imports what a command needs."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INTERRUPT = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\n"
SWALLOWS = f"try:\n    exec({INTERRUPT!r})\nexcept BaseException:\n    pass\n"
COMMAND = """
def add_arguments(parser):
    pass


def run(options):
    try:
        import HELD
        import os, signal, time

        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(20)
        print("went on")
    finally:
        print("cleaned up")
"""
STARTED = """
import signal, sys
from attnzoo import cli
from attnzoo.__main__ import entry

cli.COMMANDS["try"] = cli.Command("try_command", "")
sys.argv[1:] = ["try"]
sys.exit(entry())
"""


@pytest.mark.parametrize(("imported", "printed"), [("swallows", ""), ("json", "cleaned up\n")])
def test_an_import_cannot_swallow_ctrl_c(tmp_path, imported, printed):
    """Elsewhere it is raised, so that what the command holds is put away."""
    (tmp_path / "try_command.py").write_text(COMMAND.replace("HELD", imported))
    (tmp_path / "swallows.py").write_text(SWALLOWS)
    assert ended(tmp_path, "-c", STARTED) == (130, printed, "")


@pytest.mark.parametrize("module", ["argparse", "difflib"])
def test_ctrl_c_before_the_command_is_known(tmp_path, module):
    (tmp_path / f"{module}.py").write_text(INTERRUPT + "time.sleep(20)\n")
    assert ended(tmp_path, "-m", "attnzoo", "list") == (130, "", "")


def test_an_ignored_interrupt_stays_ignored(tmp_path):
    """A shell starts its background commands so."""
    (tmp_path / "difflib.py").write_text(INTERRUPT + "print('went on', flush=True)\nos._exit(0)\n")
    before = "import signal, runpy\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    before += "runpy.run_module('attnzoo', run_name='__main__')"
    assert ended(tmp_path, "-c", before) == (0, "went on\n", "")


def test_the_installed_command_begins_there():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["attnzoo"] == "attnzoo.__main__:entry"
    heavy = (
        "import attnzoo.__main__, sys; print([m for m in ('typing', 'argparse', 'attnzoo.cli') if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-S", "-c", heavy], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert found.stdout == "[]\n"


def ended(place: Path, *words: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of Python with the modules in `place`."""
    path = os.pathsep.join([str(place), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *words],
        cwd=place,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr
