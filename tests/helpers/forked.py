"""Python scripts in processes of their own that need not import torch and DeepSpeed first.

A server process, one for each process of the test run, has imported them, what drawing needs and the project's own
modules; every script runs in a fork of it. These imports are most of the time of a small training run. The variants of
plug-ins are read in the fork: nobody has asked for a variant before.
"""

import atexit
import gc
import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
# DeepSpeed's Muon compiles functions as it is imported, and so imports all of torch's compiler; the next two are
# imported when its engine is made.
_FORKS.set_forkserver_preload(
    [
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "deepspeed.module_inject.auto_ep_layer",
        "deepspeed.ops.op_builder.all_ops",
        "matplotlib.backends.backend_agg",
        "matplotlib.figure",
        "peft",
        "train.main",
    ]
)


def start_script(
    arguments: Sequence[str], env: Mapping[str, str], stdout: Path, stderr: Path, cwd: Path | None = None
) -> BaseProcess:
    """Runs `python arguments...` with this environment; its output goes to the two files. The exit status is the
    process's `exitcode`."""
    words = (list(arguments), dict(env), str(stdout), str(stderr), str(cwd or Path.cwd()))
    process = _FORKS.Process(target=_run, args=words)
    process.start()
    return process


def _run(arguments: list[str], env: dict[str, str], stdout: str, stderr: str, cwd: str) -> None:
    gc.freeze()  # what was imported is no garbage: DeepSpeed collects by itself, and looks at all of it each time
    os.chdir(cwd)
    for descriptor, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = arguments
    # What an interpreter of its own would have in front. What pytest has put there stays: which folder that is depends
    # on the tests that came first, and it may be the project's own.
    given = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:0] = [os.path.dirname(arguments[0]), *given]
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    finally:  # a fork ends without what `python` does at its end
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
