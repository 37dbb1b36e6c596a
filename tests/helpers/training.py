"""A run small enough for tests, and the `deepspeed` command around it."""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

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
    """The command line of a script on that many ranks."""
    if ranks == 1:
        return [sys.executable, *script]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    front = [sys.executable, str(DEEPSPEED), "--num_accelerators", str(ranks), "--master_port", str(port)]
    return [*front, *script]


def launch(
    config: Path, *overrides: str, ranks: int = 2, status: int = 0, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Runs a training to its end and checks its exit status."""
    return finish(command(config, *overrides, ranks=ranks), status, **extra)


def finish(arguments: list[str], status: int = 0, **extra: str) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end and checks its exit status."""
    result = subprocess.run(
        arguments,
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == status, f"exit status {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def losses(run: Path, kind: str = "train", field: str = "loss") -> dict[int, float]:
    """Losses by step, to the last bit."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    chosen = [r for r in records if r["kind"] == kind]
    assert len({r["step"] for r in chosen}) == len(chosen), "a step was recorded twice"
    return {r["step"]: r[field] for r in chosen}
