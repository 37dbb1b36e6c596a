"""Jobs in worker processes."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

CODE = """
import time
from functools import partial
from attnzoo.progress import Progress
from attnzoo.workers import run_jobs
from tests.integration.test_workers import waits
if __name__ == "__main__":
    run_jobs({str(n): partial(waits, f"{folder}/{n}") for n in range(2)}, 2, Progress(2))
"""


def waits(path: str, tick) -> None:
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_when_their_parent_is_gone(tmp_path, number):
    script = tmp_path / "jobs.py"
    script.write_text(f"folder = {str(tmp_path)!r}\n{CODE}")
    parent = subprocess.Popen([sys.executable, script], env={**os.environ, "PYTHONPATH": os.getcwd()})
    files = [tmp_path / str(n) for n in range(2)]
    deadline = time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = [psutil.Process(int(file.read_text())) for file in files]
    parent.send_signal(number)
    parent.wait(20)
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
