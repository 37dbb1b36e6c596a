"""Runs blocks of the documents. `python -m tests.docs.walk PAGE NUMBER...` runs Python blocks of a page."""

import os
import subprocess
import sys
from pathlib import Path

from tests.docs import small
from tests.docs.blocks import ROOT, Block, blocks


def prepare(directory: Path) -> None:
    """Makes a directory look like the root of the project, with an `attnzoo` command of this interpreter."""
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in ("runs", "site", "build"):
            (directory / entry.name).symlink_to(entry)
    programs = directory / ".bin"
    programs.mkdir()
    for name, module in (("attnzoo", "-m attnzoo"), ("python", ""), ("pytest", "-m pytest")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {module} "$@"\n')
        (programs / name).chmod(0o755)


def environment(directory: Path) -> dict[str, str]:
    """This one, with the directory's commands first."""
    path = f"{directory / '.bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}


def shell(block: Block, directory: Path, known: dict[str, str]) -> dict[str, str]:
    """Runs a block; returns the environment that it leaves. Raises CalledProcessError when a command fails."""
    left = directory / ".environment"
    code = f"set -euo pipefail\n{block.code}\nenv -0 > {left}\n"
    subprocess.run(["bash", "-c", code], cwd=directory, env=known, check=True, timeout=1200)
    return dict(pair.split("=", 1) for pair in left.read_text().split("\0") if pair)


def python(group: list[Block], directory: Path, known: dict[str, str]) -> None:
    """Runs blocks in one new Python. Raises CalledProcessError when one of them raises."""
    if group:
        page = group[0].page
        numbers = [str(blocks(page).index(block)) for block in group]
        words = [sys.executable, "-m", "tests.docs.walk", str(page), *numbers]
        subprocess.run(words, cwd=directory, env=known, check=True, timeout=1200)


def walk(page: Path, directory: Path) -> None:
    """Goes through a page as a reader would: all blocks in order, without those that never run and commands that are
    only checked. Shell blocks share their environment; the Python blocks between two of them are one session."""
    prepare(directory)
    known, session = environment(directory), list[Block]()
    for block in blocks(page):
        if block.language == "sh" and block.mode in ("run", "slow"):
            python(session, directory, known)
            known, session = shell(block, directory, known), []
        elif block.language == "python" and block.mode != "never":
            session.append(block)
    python(session, directory, known)


def run_python(block: Block, names: dict[str, object]) -> None:
    """Executes a block, and what stands hidden before it; errors carry the page and the line."""
    exec(compile(block.before, f"{block.where} (before)", "exec"), names)
    exec(compile("\n" * (block.line - 1) + block.code, str(block.page), "exec"), names)


def new_names() -> dict[str, object]:
    """What blocks find: what hidden ones call."""
    made = {name: each for name, each in vars(small).items() if name.startswith("small_")}
    return {"__name__": "__main__", **made}


if __name__ == "__main__":
    names, found = new_names(), blocks(Path(sys.argv[1]))
    for number in sys.argv[2:]:
        run_python(found[int(number)], names)
