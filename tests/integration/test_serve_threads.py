"""How many threads of torch a server of `attnzoo serve` computes with, and that loading leaves none behind."""

import threading
import warnings
from typing import Any

import psutil
import pytest
import torch

from attnzoo.report import available_cores
from serve.config import ServeConfig

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


def test_what_loading_computes_with_is_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A team of OpenMP that stays with the thread that loaded would halve the speed of the engine's thread."""
    threads = []

    def load(config: ServeConfig) -> tuple[None, None, None]:
        threads.append(threading.current_thread())
        torch.set_num_threads(4)
        torch.ones(512, 512) @ torch.ones(512, 512)
        torch.ones(1 << 22).exp_()
        during.append(psutil.Process().num_threads())
        return None, None, None

    before, during, most = psutil.Process().num_threads(), [], torch.get_num_threads()
    monkeypatch.setattr(deployment, "load", load)
    try:
        assert deployment.load_apart(ServeConfig(checkpoint="none")) == (None, None, None)
    finally:
        torch.set_num_threads(most)
    assert threads[0] is not threading.current_thread()
    assert not threads[0].is_alive()
    assert during[0] >= before + 1 + 3, "this thread and three more of its team"
    assert psutil.Process().num_threads() <= before + 1, "its team is still there"


def test_errors_of_loading_are_those_of_the_constructor(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(config: ServeConfig) -> None:
        raise ValueError("the model is not there")

    monkeypatch.setattr(deployment, "load", load)
    with pytest.raises(ValueError, match="the model is not there"):
        deployment.load_apart(ServeConfig(checkpoint="none"))
