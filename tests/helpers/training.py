"""A run small enough for tests, and the `deepspeed` command around it."""

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.helpers.forked import start_script

ROOT = Path(__file__).resolve().parents[2]
DEEPSPEED = Path(sys.executable).with_name("deepspeed")

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "every",
    "small",
    "dog",
    "ran",
    "round",
    "green",
    "trees",
    "and",
    "sang",
]

TINY = """\
base: {base}
name: tiny
run_dir: {run}
cache_dir: {cache}
model:
  model_dim: 24
  num_layers: 2
  attention: {{kind: rcmha, num_heads: 2}}
  max_positions: 16
tokenizer: {{vocab_size: 300}}
data: {{source: {corpus}, sequence_length: 16}}
optim: {{name: muon, lr: 0.01, muon_lr: 0.02}}
schedule: {{kind: cosine, warmup_steps: 2}}
train: {{steps: 6, batch_size: 8, micro_batch_size: 2, threads: 1}}
eval: {{every: 3, batch_size: 4, max_blocks: 12}}
log: {{progress: false, tensorboard: false}}
checkpoint: {{every: null}}
"""


def write_tiny(directory: Path) -> Path:
    """A corpus and a configuration in `directory`; returns the configuration's path."""
    generator = random.Random(0)
    lines = (" ".join(generator.choices(WORDS, k=9)) + ".\n" for _ in range(400))
    corpus = directory / "corpus.txt"
    corpus.write_text("".join(lines), encoding="utf-8")
    config = directory / "tiny.yaml"
    config.write_text(
        TINY.format(
            base=ROOT / "configs" / "base.yaml", run=directory / "run", cache=directory / "cache", corpus=corpus
        ),
        encoding="utf-8",
    )
    return config


def environment(**extra: str) -> dict[str, str]:
    """Compiled extensions come from the project's cache, so that only the first test run compiles them."""
    extensions = str(ROOT / ".cache" / "torch_extensions")
    return {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": extensions, **extra}


def command(config: Path, *overrides: str, ranks: int = 2) -> list[str]:
    """The command line of a run; with one rank, plain python."""
    return launcher([str(ROOT / "train" / "main.py"), "--config", str(config), *overrides], ranks)


def launcher(script: list[str], ranks: int) -> list[str]:
    """The command line of a script on that many ranks, under the `deepspeed` command."""
    if ranks == 1:
        return [sys.executable, *script]
    front = [sys.executable, str(DEEPSPEED), "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    return [*front, *script]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def launch(
    config: Path, *overrides: str, ranks: int = 2, status: int = 0, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Runs a training to its end and checks its exit status.

    The ranks get what the `deepspeed` command gives them, but come without it and find torch and DeepSpeed imported,
    which is most of the time of a small run. Tests of the command itself use `command`.
    """
    script = [str(ROOT / "train" / "main.py"), "--config", str(config), *last_of(overrides)]
    return run_ranks(script, ranks, status, **extra)


def last_of(overrides: Iterable[str]) -> list[str]:
    """`key=value` words without those whose key comes again, which the command refuses: what a test has of its own
    takes precedence."""
    return list({word.partition("=")[0]: word for word in overrides}.values())


def run_ranks(script: list[str], ranks: int, status: int = 0, **extra: str) -> subprocess.CompletedProcess[str]:
    """Runs a script on that many ranks of this machine and checks the exit status. The first rank that fails ends the
    others, and its status is the result."""
    with tempfile.TemporaryDirectory() as directory:
        processes = start_ranks(script, ranks, Path(directory), **extra)
        found = first_failure(processes, time.monotonic() + 300)
        texts = [
            "".join(Path(directory, f"{name}-{rank}").read_text("utf-8", "replace") for rank in range(ranks))
            for name in ("out", "err")
        ]
    return _checked(subprocess.CompletedProcess([sys.executable, *script], found, *texts), status)


def start_ranks(
    script: list[str], ranks: int, directory: Path, cwds: Sequence[Path] | None = None, **extra: str
) -> list[BaseProcess]:
    """Starts a script on that many ranks of this machine (rank r in `cwds[r]`); what they say goes to `out-0`, `err-0`,
    `out-1`, ... in the directory."""
    meeting = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in range(ranks):
        out, err = (directory / f"{name}-{rank}" for name in ("out", "err"))
        own = {} if ranks == 1 else {**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        given = {**environment(), **own, **extra}
        processes.append(start_script(script, given, out, err, None if cwds is None else cwds[rank]))
    return processes


def first_failure(processes: list[BaseProcess], deadline: float) -> int:
    """The status of the first process that fails, 0 if none does; none runs on."""
    try:
        while True:
            states = [process.exitcode for process in processes]
            failed = next((state for state in states if state), None)
            if failed is not None:
                return failed
            if all(state == 0 for state in states):
                return 0
            assert time.monotonic() < deadline, "the ranks did not end"
            time.sleep(0.02)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(30)
            if process.is_alive():
                process.kill()


def finish(arguments: list[str], status: int = 0, **extra: str) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end and checks its exit status."""
    return _checked(
        subprocess.run(arguments, env=environment(**extra), capture_output=True, text=True, timeout=300, check=False),
        status,
    )


def _checked(result: subprocess.CompletedProcess[str], status: int) -> subprocess.CompletedProcess[str]:
    assert result.returncode == status, f"exit status {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def losses(run: Path, kind: str = "train", field: str = "loss") -> dict[int, float]:
    """Losses by step, to the last bit."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    chosen = [r for r in records if r["kind"] == kind]
    assert len({r["step"] for r in chosen}) == len(chosen), "a step was recorded twice"
    return {r["step"]: r[field] for r in chosen}


def stay_records(run: Path) -> dict[tuple[str, int], dict[str, float]]:
    """metrics.jsonl of a run on stays, by kind and step, without what depends on the machine."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = (
        "seconds",
        "step_seconds",
        "stays_per_second",
        "days_per_second",
        "dialogues_per_second",
        "peak_memory_mib",
    )
    return {
        (line["kind"], line["step"]): {key: value for key, value in line.items() if key not in measured}
        for line in lines
    }
