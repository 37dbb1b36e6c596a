"""How many threads of torch a server of `attnzoo serve` computes with, and that loading leaves none behind."""

import subprocess
import sys
import warnings
from typing import Any

import pytest

from attnzoo.report import available_cores
from serve.config import ServeConfig
from tests.helpers.ray_server import environment

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own deprecations
    from serve import deployment


@pytest.mark.parametrize(
    ("settings", "variable", "expected"),
    [
        ({}, None, available_cores()),
        ({}, "3", None),
        ({"threads": 1}, None, 1),
        ({"threads": 2}, "3", 2),
        ({"cluster": "auto"}, None, None),
    ],
    ids=str,
)
def test_a_local_server_has_a_thread_for_each_core(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], variable: str | None, expected: int | None
) -> None:
    if variable is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    config = ServeConfig(checkpoint="none", **settings)
    assert deployment.with_threads(config).threads == expected


ALONE = """
import threading, warnings
import psutil, torch
from serve.config import ServeConfig
warnings.simplefilter("ignore")
from serve import deployment

torch.set_num_threads(4)  # which starts threads of another kind, that stay

def load(config):
    torch.ones(1 << 22).exp_()
    during.append((psutil.Process().num_threads() - before, threading.current_thread()))
    return None, None, None

deployment.load, during, before = load, [], psutil.Process().num_threads()
deployment.load_apart(ServeConfig(checkpoint="none"))
for _ in range(100):
    if (left := psutil.Process().num_threads() - before) <= 0:
        break
    threading.Event().wait(0.05)
more, thread = during[0]
print(more, left, thread.is_alive(), thread is threading.main_thread())
"""


def test_what_loading_computes_with_is_gone_afterwards() -> None:
    """A team of OpenMP that stays with the thread that loaded would halve the speed of the engine's thread. (In a
    process of its own, where nothing else begins or ends threads.)"""
    done = subprocess.run(
        [sys.executable, "-c", ALONE], env=environment(), capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split() == ["4", "0", "False", "False"], "a thread and three more of its team, then none"


def test_errors_of_loading_are_those_of_the_constructor(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(config: ServeConfig) -> None:
        raise ValueError("the model is not there")

    monkeypatch.setattr(deployment, "load", load)
    with pytest.raises(ValueError, match="the model is not there"):
        deployment.load_apart(ServeConfig(checkpoint="none"))
