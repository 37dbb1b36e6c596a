"""Python scripts in processes of their own that need not import torch and DeepSpeed first.

A server process, one for each process of the test run, has imported them; every script runs in a fork of it. These
imports are most of the time of a small training run. The project's own modules are imported by each script anew.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
# DeepSpeed's Muon compiles functions as it is imported, and so imports all of torch's compiler.
_FORKS.set_forkserver_preload(["deepspeed.runtime.zero.muon.muon_optimizer", "matplotlib.backends.backend_agg"])


def start_script(arguments: Sequence[str], env: Mapping[str, str], stdout: Path, stderr: Path) -> BaseProcess:
    """Runs `python arguments...` with this environment; its output goes to the two files. The exit status is the
    process's `exitcode`."""
    process = _FORKS.Process(target=_run, args=(list(arguments), dict(env), str(stdout), str(stderr)))
    process.start()
    return process


def _run(arguments: list[str], env: dict[str, str], stdout: str, stderr: str) -> None:
    for descriptor, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = arguments
    sys.path[0] = os.path.dirname(arguments[0])
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    finally:  # a fork ends without what `python` does at its end
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
