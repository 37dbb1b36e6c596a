"""What is dear to make is made once in a test run, however many processes share its tests."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The directory `name` of this test run: the first process that asks for it calls `make` with it, the others wait.
    What `make` leaves there when it raises is removed."""
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    directory, made = shared / name, shared / f"{name}.made"
    with FileLock(shared / f"{name}.lock"):
        if not made.exists():
            directory.mkdir()
            try:
                make(directory)
            except BaseException:
                shutil.rmtree(directory)
                raise
            made.touch()
    return directory
