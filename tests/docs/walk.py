"""Goes through a page as a reader would: python -m tests.docs.walk PAGE DIRECTORY. Blocks run in order, those that are
marked "never" left out; Python blocks share their names, and shell blocks their environment and directory."""

import os
import subprocess
import sys
from pathlib import Path

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


def walk(page: Path, directory: Path) -> None:
    """Runs all blocks of a page but those that never run."""
    from tests.docs.helpers import small_checkpoint

    prepare(directory)
    os.chdir(directory)
    known, names = environment(directory), {"__name__": "__main__", "small_checkpoint": small_checkpoint}
    for block in blocks(page):
        if block.mode == "never":
            continue
        if block.language == "sh" and block.mode in ("run", "slow"):
            known = shell(block, directory, known)
            os.environ.update(known)
        elif block.language == "python":
            run_python(block, names)


def run_python(block: Block, names: dict[str, object]) -> None:
    """Executes a block, and what stands hidden before it; errors carry the page and the line."""
    exec(compile(block.before, f"{block.where} (before)", "exec"), names)
    exec(compile("\n" * (block.line - 1) + block.code, str(block.page), "exec"), names)


if __name__ == "__main__":
    walk(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
