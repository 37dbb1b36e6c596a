"""Communication between ranks besides tensors: values, and errors that all ranks raise together."""

import errno
import os
import socket
import time
from collections.abc import Callable
from typing import Any, TypeVar

import psutil
import torch.distributed as dist

from attnzoo.report import available_cores
from train.failures import AgreedError, TrainingError, explain, status_of
from train.stop import find_launcher

T = TypeVar("T")


def joined() -> bool:
    """Whether this process has joined the process group."""
    return bool(dist.is_initialized())


def is_first() -> bool:
    """Whether this is rank 0."""
    return not dist.is_initialized() or dist.get_rank() == 0


def from_main(value: Any) -> Any:
    """Returns rank 0's value on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Returns the values of all ranks, by rank, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agree(work: Callable[[], T]) -> T:
    """Runs `work`, which must not communicate with other ranks, on every rank, and returns this rank's result.

    A ValueError, TrainingError or OSError on any rank is raised as an AgreedError on all ranks, so that no rank waits
    for one that has failed, and rank 0 can report the error and its rank.
    """
    result, mistake = None, None
    try:
        result = work()
    except (ValueError, TrainingError, OSError) as error:
        mistake = (status_of(error), explain(error), socket.gethostname())
    mistakes = gather(mistake)
    if any(mistakes):
        raise _together(mistakes)
    return result  # type: ignore[return-value]


def decide(work: Callable[[], T]) -> T:
    """Runs `work` on rank 0 only, and returns its result on every rank. Raises AgreedError as `agree` does."""
    return from_main(agree(lambda: work() if is_first() else None))


def finish() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _together(mistakes: list[Any]) -> AgreedError:
    """One error for all ranks: the message alone if all ranks have the same, else messages with rank and host."""
    told = [mistake for mistake in mistakes if mistake is not None]
    status = told[0][0]
    texts = list(dict.fromkeys(text for _, text, _ in told))
    if len(mistakes) == 1 or (len(texts) == 1 and mistakes[0] is not None):
        return AgreedError(status, texts[0])
    lines = []
    for text in texts:
        ranks = [rank for rank, mistake in enumerate(mistakes) if mistake is not None and mistake[1] == text]
        host = mistakes[ranks[0]][2]
        more = f" (and {len(ranks) - 1} more ranks)" if len(ranks) > 1 else ""
        lines.append(f"rank {ranks[0]} on {host}{more}: {text}")
    return AgreedError(status, "; ".join(lines))


def check_port() -> None:
    """Raises ValueError if MASTER_PORT is taken, so that ranks do not join the ranks of another run.

    If two runs begin at the same moment on one port, rank 0 of one of them finds the port in use. Its other ranks must
    not join the other run, so they wait until their own rank 0 listens.
    """
    port, world = int(os.environ["MASTER_PORT"]), os.environ["WORLD_SIZE"]
    if world == "1" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    if port == 0:
        raise ValueError(
            "port 0 is no place where several ranks can meet: each would take another one; leave --master_port out, or "
            f"give a free port, for example {free_port()}"
        )
    if os.environ["RANK"] == "0":
        if _in_use(port):
            raise port_taken(port)
    elif os.environ.get("LOCAL_SIZE") == world and find_launcher() is not None:
        while True:
            in_use = _in_use(port)
            if _first_rank_listens(port):
                return
            if in_use:
                raise port_taken(port)
            time.sleep(0.1)


def _in_use(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return True
            raise
    return False


def _first_rank_listens(port: int) -> bool:
    """Whether a process of this run (a child of the same launcher) listens at the port."""
    for process in psutil.Process(os.getppid()).children():
        try:
            found = process.net_connections("tcp")
        except psutil.Error:
            continue  # it has just ended
        if any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in found):
            return True
    return False


def port_taken(port: int | str) -> ValueError:
    """The error for a MASTER_PORT that is in use."""
    return ValueError(
        f"port {port} of this machine, where the ranks would meet, is in use, perhaps by another training: start with "
        f"deepspeed --master_port {free_port()}"
    )


def threads_of_rank(asked: int | None) -> int | None:
    """CPU threads of this rank: as asked, else its part of the cores of its machine, where several ranks share them and
    OMP_NUM_THREADS says nothing: ranks that wait for one another's threads take half as long again. None: torch's own
    number."""
    ranks = int(os.environ.get("LOCAL_SIZE", "1"))
    if asked is not None or ranks == 1 or "OMP_NUM_THREADS" in os.environ:
        return asked
    return max(1, available_cores() // ranks)


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
