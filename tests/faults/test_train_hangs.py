"""Ranks that stop, hosts that do not share, two runs at once, terminals that close, machines without a compiler."""

import fcntl
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.helpers.forked import start_script
from tests.helpers.training import ROOT, command, environment, launch, losses, start_ranks, write_tiny

MAIN = ROOT / "train" / "main.py"
LONG = ("train.steps=1000000", "eval.every=null", "schedule.kind=constant")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("hangs"))


def test_a_stopped_rank_ends_the_run_with_stacks(tiny: Path, tmp_path: Path) -> None:
    """Rank 1 stands still; rank 0 hears of SIGTERM though it waits for rank 1. A second run is refused meanwhile."""
    run = tmp_path / "run"
    options = (f"run_dir={run}", *LONG, "watchdog.stop=2")
    ranks = start_ranks([str(MAIN), "--config", str(tiny), *options], 2, tmp_path)
    try:
        deadline = time.monotonic() + 200
        while not (run / "metrics.jsonl").is_file() or (run / "metrics.jsonl").read_text("utf-8").count("\n") < 3:
            assert all(rank.is_alive() for rank in ranks), "the run ended early"
            assert time.monotonic() < deadline
            time.sleep(0.1)
        second = launch(tiny, *options, ranks=1, status=2).stderr
        assert re.search(rf"train: run_dir=.* is in use by another run \(host .*, pid {ranks[0].pid}\)", second)
        assert "Traceback" not in second
        os.kill(ranks[1].pid or 0, signal.SIGSTOP)
        ranks[0].terminate()
        ranks[0].join(60)
        assert ranks[0].exitcode == 1
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    text = (tmp_path / "err-0").read_text(errors="replace")
    assert "train: rank 0 on" in text
    assert "was told to stop and its phase step did not end in 2 s (watchdog.stop)" in text
    assert re.search(
        r'Thread 0x\w+ \(most recent call first\):\n(  File .*\n)*  File ".*loop.py", line \d+ in take_step', text
    )


def test_hosts_that_do_not_share_the_run_directory(tiny: Path, tmp_path: Path) -> None:
    """Two ranks, each in a directory of its own: a relative run_dir means two places."""
    places = [tmp_path / str(rank) for rank in range(2)]
    for place in places:
        place.mkdir()
    ranks = start_ranks([str(MAIN), "--config", str(tiny), "run_dir=run"], 2, tmp_path, places, LOCAL_SIZE="2")
    for rank in ranks:
        rank.join(120)
    told = [(tmp_path / f"err-{rank}").read_text("utf-8") for rank in range(2)]
    assert [rank.exitcode for rank in ranks] == [2, 2], told
    line = re.findall(r"^train: .*", told[0], re.M)
    assert len(line) == 1
    assert re.match(
        r"train: rank 1 on .*: run_dir=run is not the directory that rank 0 on .* has under this name", line[0]
    )
    assert "on a file system that all hosts share" in line[0]
    assert not re.findall(r"^train: ", told[1], re.M)
    assert not (tmp_path / "0/run/checkpoints").exists()


def test_a_mistake_of_one_rank_is_told_with_its_rank(tiny: Path, tmp_path: Path) -> None:
    """Only rank 1 has a plug-in, and so a variant, of another making: the run's data are gone for it."""
    (tmp_path / "plug.py").write_text(
        "import os\n"
        "import train.tasks.language as language\n"
        "from attnzoo.attention import ATTENTION\n"
        "ATTENTION.register('plug')(type('Plug', (ATTENTION.get('mha'),), {'__doc__': 'Another name.'}))\n"
        "def gone(*a, **k):\n"
        "    raise ValueError('these tokens cannot be read')\n"
        "if os.environ.get('RANK') == '1':\n"
        "    language.prepare = gone\n",
        encoding="utf-8",
    )
    found = launch(tiny, f"run_dir={tmp_path / 'run'}", status=2, ATTNZOO_PLUGINS=str(tmp_path / "plug.py")).stderr
    lines = re.findall(r"^train: .*", found, re.M)
    assert len(lines) == 1, found
    assert re.match(r"train: rank 1 on \S+: these tokens cannot be read$", lines[0])


def test_a_failure_of_one_rank_ends_all_with_its_rank(tiny: Path, tmp_path: Path) -> None:
    """A variant raises on rank 1 in the middle of a step: its traceback, one line with the rank, status 1, no hang."""
    (tmp_path / "fails.py").write_text(
        "import os\n"
        "from attnzoo.attention.base import ATTENTION\n"
        "from attnzoo.attention.mha import MHA\n"
        "@ATTENTION.register('fails')\n"
        "class Fails(MHA):\n"
        "    def forward(self, *args, **options):\n"
        "        if self.training and os.environ['RANK'] == '1':\n"
        "            raise RuntimeError('the variant has a mistake')\n"
        "        return super().forward(*args, **options)\n",
        encoding="utf-8",
    )
    options = (f"run_dir={tmp_path / 'run'}", "model.attention={kind: fails, num_heads: 2}", "optim.name=adamw")
    found = launch(tiny, *options, status=1, ATTNZOO_PLUGINS=str(tmp_path / "fails.py")).stderr
    lines = re.findall(r"^train: .*", found, re.M)
    own = [line for line in lines if "lost the connection" not in line]
    assert len(own) == 1, found
    assert re.match(r"train: rank 1 on \S+: ended by RuntimeError: the variant has a mistake$", own[0]), found
    assert found.count("Traceback") == 1


def test_several_ranks_need_a_compiler(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    bare = {"PATH": str(tmp_path / "bin"), "CXX": "/nowhere/c++", "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    found = launch(tiny, f"run_dir={tmp_path / 'run'}", status=2, **bare).stderr
    lines = re.findall(r"^train: .*", found, re.M)
    assert len(lines) == 1, found
    assert "with a C++ compiler, and that failed" in lines[0]
    assert "or train on one rank, which needs none" in lines[0]
    assert "Traceback" not in found


def test_a_second_launcher_on_the_same_port(tiny: Path, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        words = command(tiny, f"run_dir={tmp_path / 'run'}")
        words[words.index("--master_port") + 1] = str(port)
        result = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    lines = re.findall(r"^train: .*", result.stderr, re.M)
    assert len(lines) == 1
    assert f"port {port} of this machine" in lines[0]
    assert "deepspeed --master_port " in lines[0]
    assert "Traceback" not in result.stderr


def _own_terminal() -> None:
    """Takes standard input for the process's terminal, and hears when it is closed: tests under nohup would not."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_closing_the_terminal_saves(tiny: Path, tmp_path: Path) -> None:
    """The run has the terminal for its output, so that writing fails once it is closed. No compiler is in reach. Before
    that the terminal has said what was done before the first step."""
    run, shown = tmp_path / "run", b""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        command(tiny, f"run_dir={run}", *LONG, "log.progress=true", ranks=1),
        env=environment(PATH="/nonexistent", CXX="/nonexistent/c++", TORCH_EXTENSIONS_DIR=str(tmp_path / "none")),
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
        preexec_fn=_own_terminal,
    )
    os.close(follower)
    os.set_blocking(leader, False)
    try:
        deadline = time.monotonic() + 120
        metrics = run / "metrics.jsonl"
        while not (metrics.is_file() and metrics.read_text(encoding="utf-8").count("\n") >= 3):
            assert process.poll() is None
            assert time.monotonic() < deadline
            try:
                shown += os.read(leader, 65536)
            except BlockingIOError:
                time.sleep(0.05)
        os.close(leader)
        lines = re.findall(r"tiny: (starting 1 rank|preparing the tokenizer|building the model)\b", shown.decode())
        assert lines == ["starting 1 rank", "preparing the tokenizer", "building the model"], shown
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
    name = (run / "checkpoints" / "latest").read_text().strip()
    assert int(name.removeprefix("step-")) == max(losses(run))
    assert (run / "export" / "config.json").is_file()


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tiny: Path, tmp_path: Path) -> None:
    """Files may not grow to the size of a checkpoint, as if the disk were full in the middle of one."""
    run = tmp_path / "run"
    launch(tiny, f"run_dir={run}", "train.stop_at_step=2", ranks=1)
    largest = max(p.stat().st_size for p in (run / "checkpoints" / "step-00000002").iterdir())
    (tmp_path / "full.py").write_text(
        "import resource\n"
        "from attnzoo.attention import ATTENTION\n"
        "ATTENTION.register('full')(type('Full', (ATTENTION.get('mha'),), {'__doc__': 'What a plug-in has.'}))\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({largest - 1000}, {largest - 1000}))\n",
        encoding="utf-8",
    )
    found = launch(tiny, f"run_dir={run}", ranks=1, status=1, ATTNZOO_PLUGINS=str(tmp_path / "full.py")).stderr
    lines = re.findall(r"^train: .*", found, re.M)
    assert len(lines) == 1
    assert "step-00000006 could not be written" in lines[0]
    assert "the newest checkpoint is step-00000002, and the same command resumes from it" in lines[0]
    assert "Traceback" not in found
    launch(tiny, f"run_dir={run}", ranks=1)
    assert list(losses(run)) == [1, 2, 3, 4, 5, 6]
    assert not list((run / "checkpoints").glob(".*"))


def test_places_and_plugins_that_do_not_work_are_one_line(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "bad.py").write_text("import torch\n\nnonsense\n", encoding="utf-8")
    bad = {"ATTNZOO_PLUGINS": str(tmp_path / "bad.py")}
    huge = ("model.model_dim=200000", "model.num_layers=90", f"run_dir={tmp_path / 'huge'}")
    for overrides, variables, words in (
        ((f"run_dir={tmp_path / 'file'}",), {}, "run_dir="),
        ((f"cache_dir={tmp_path / 'file'}", f"run_dir={tmp_path / 'a'}"), {}, "cache_dir="),
        (huge, {}, "MiB are free"),
        ((), bad, "bad.py"),
    ):
        found = launch(tiny, *overrides, ranks=1, status=2, **variables).stderr
        assert words in found, found
        assert "Traceback" not in found
        assert len(re.findall(r"^train: .*", found, re.M)) == 1


WATCHED = """
import time
from train.config import WatchdogConfig
from train.watchdog import Watchdog
import train.watchdog as module
module.OTHERS_SECONDS, module.BACKSTOP_SECONDS = 0.0, 1.0
with Watchdog(WatchdogConfig(step={step}, stop={stop})) as dog:
    with dog.phase("step"):
        pass
    with dog.phase("step"):
        {body}
print("done")
"""


@pytest.mark.parametrize(
    ("step", "stop", "body", "status", "words"),
    [
        (30.0, 30.0, "time.sleep(0.01)", 0, ""),
        (0.3, None, "time.sleep(20)", 1, "its phase step took longer than 0.3 s (watchdog.step)"),
        (None, None, "time.sleep(0.5)", 0, ""),
        # A library that holds the interpreter's lock: the system's timer ends the process.
        (0.1, None, "import ctypes; ctypes.PyDLL(None).sleep(20)", 1, "most recent call first"),
        (
            60.0,
            0.3,
            "import os, signal; signal.signal(15, lambda *_: None); os.kill(os.getpid(), 15); time.sleep(20)",
            1,
            "was told to stop and its phase step did not end in 0.3 s (watchdog.stop)",
        ),
    ],
)
def test_a_phase_that_lasts_too_long(
    step: float, stop: float, body: str, status: int, words: str, tmp_path: Path
) -> None:
    script, out, err = (tmp_path / name for name in ("watched.py", "out", "err"))
    script.write_text(WATCHED.format(step=step, stop=stop, body=body), encoding="utf-8")
    process = start_script([str(script)], environment(), out, err)
    process.join(60)
    assert process.exitcode == status, err.read_text()
    assert words in err.read_text()
    assert ("done" in out.read_text()) == (status == 0)


TOLD = """
import os, signal, sys, time
from train.config import WatchdogConfig
from train.watchdog import Watchdog

signal.signal(signal.SIGTERM, lambda *_: None)
with Watchdog(WatchdogConfig(stop=0.5)) as watchdog:
    if sys.argv[1] == "in a step":
        with watchdog.phase("step"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.4)
    else:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.4)
    with watchdog.phase("save"):
        time.sleep(1.5)
    print("saved", flush=True)
    with watchdog.phase("step"):
        time.sleep(30)
"""


@pytest.mark.parametrize("when", ["in a step", "between steps"])
def test_a_signal_limits_every_later_step_and_no_save(when: str) -> None:
    """Ranks agree on a stop in a step: one that was told at the end of one, or between two, waits in the next."""
    done = subprocess.run(
        [sys.executable, "-c", TOLD, when], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (1, "saved\n"), done.stderr
    assert "was told to stop and its phase step did not end in 0.5 s (watchdog.stop)" in done.stderr
