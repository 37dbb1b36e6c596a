"""One thread a process: tests run side by side on small machines, and sums then have one order."""

import os
import random
import signal
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

from attnzoo.report import available_cores
from tests.helpers.interpreter import quicken
from tests.helpers.shares import Kind, in_shares

torch.set_num_threads(1)

# Where the suite runs in the background Ctrl-C is ignored, and what tests start and interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Read when triton is first imported: without a GPU its kernels run in the interpreter, in the same process as all else.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in whatever order, and in whichever process, tests run."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if "triton" in item.path.name and "TRITON_INTERPRET" in os.environ and find_spec("triton") is not None:
        quicken()


QUICK_FOLDERS = ("unit", "contract", "architecture", "golden")
"""Without DeepSpeed, Ray and HTTP."""
QUICK_KINDS = ("mha", "rcmha", "linear", "in_context_linear")
"""One variant of each kind of state: keys and values, with a convolution's rows, a sum, none at all."""
QUICK_CASES = 2


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        action="store_true",
        help="a sample for every few minutes: the contract of one variant of each kind, two cases of every other test "
        "of " + ", ".join(QUICK_FOLDERS),
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        _leave_a_sample(config, items)
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if processes > 1:
        items[:] = in_shares(items, processes, lambda item: str(item.path), _kind)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """One process more than there are cores: tests that start servers and ranks wait for them half of their time. The
    quick tests start none."""
    return None if config.getoption("--quick") else available_cores() + 1


def _kind(item: pytest.Item) -> Kind:
    if _folder(item) not in QUICK_FOLDERS or hasattr(item.getparent(pytest.Module).obj, "start_script"):
        return Kind.STARTS_PROCESSES
    return Kind.SHORT if item.get_closest_marker("heavy") is None else Kind.LONG


def _folder(item: pytest.Item) -> str:
    """The folder below tests/."""
    return Path(item.nodeid.partition("::")[0]).parts[1]


def _leave_a_sample(config: pytest.Config, items: list[pytest.Item]) -> None:
    cases: Counter[str] = Counter()
    kept, left = [], []
    for item in items:
        function = item.nodeid.partition("[")[0]
        cases[function] += 1
        (kept if _is_quick(item, cases[function]) else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


def _is_quick(item: pytest.Item, case: int) -> bool:
    if _folder(item) not in QUICK_FOLDERS or item.get_closest_marker("heavy"):
        return False
    if item.nodeid.startswith("tests/contract/test_contract.py"):
        return any(item.nodeid.endswith(f"[{kind}-{name}]") for kind in QUICK_KINDS for name in _items())
    return case <= QUICK_CASES


def _items() -> tuple[str, ...]:
    from tests.contract.contract import ITEMS

    return tuple(ITEMS)
