"""`attnzoo train`: starts DeepSpeed's launcher with ranks on this machine."""

import argparse
import importlib
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from attnzoo import apps

EXAMPLES = """examples:
  attnzoo train --config rcmha.yaml --dry-run
  attnzoo train --config rcmha.yaml train.steps=200 optim.lr=1e-3 run_dir=runs/try
  attnzoo train --config rcmha.yaml --ranks 2 data.source=my.jsonl zero.stage=2 precision=bf16
  attnzoo train --config finetune.yaml checkpoint.init_from=smollm2

configs/base.yaml explains every key. After Ctrl-C, or SIGTERM to a rank, training finishes its step, saves a
checkpoint and exits with status 0; the same command resumes it. Exit status: 2 for a mistake found before the run
begins, 1 if the run failed. Several machines: deepspeed --hostfile FILE train/main.py --config ...
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options and examples."""
    parser.description = "Train a language model with DeepSpeed on this machine's GPUs, or on its CPU."
    parser.epilog = EXAMPLES
    parser.add_argument("--config", required=True, metavar="FILE", help="a name in configs/, or a path")
    parser.add_argument("--ranks", type=int, help="number of processes (default: one for each GPU, at least one)")
    parser.add_argument("--dry-run", action="store_true", help="print configuration, sizes and memory; do not train")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.steps=100")


def run(options: argparse.Namespace) -> int:
    """Replaces this process with the launcher, which then gets signals and sets the exit status. Raises ValueError."""
    words = ["--config", options.config, *options.overrides]
    if options.ranks is not None and options.ranks < 1:
        raise ValueError(f"--ranks={options.ranks} must be at least 1")
    apps.use()
    # A mistake is said here, in a line; from the ranks it would come later, between the launcher's.
    importlib.import_module("train.config_reader").load_config(options.config, options.overrides)
    if options.dry_run:
        environment = training_environment() | {"WORLD_SIZE": str(options.ranks or gpus() or 1)}
        command = [sys.executable, main_file(), *words, "--dry-run"]
    else:
        environment = training_environment()
        command = launch_command(options.ranks or gpus() or 1, words)
    sys.stdout.flush()
    os.execve(command[0], command, environment)


def launch_command(ranks: int, words: Sequence[str]) -> list[str]:
    """The command that starts `ranks` processes on this machine. words: arguments of train/main.py."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    front = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
    return [*front, "--master_port", str(port), main_file(), *words]


def main_file() -> str:
    """The path of train/main.py, which every rank runs."""
    return str(apps.directory() / "train" / "main.py")


def training_environment() -> dict[str, str]:
    """The environment of the ranks: the programs of this Python environment come first on PATH (ninja is needed to
    compile an extension), and without a GPU DeepSpeed uses the CPU."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    chosen: Mapping[str, str] = {} if gpus() else {"DS_ACCELERATOR": "cpu"}
    return {**chosen, **os.environ, "PATH": path}


def gpus() -> int:
    """Number of GPUs that torch can use."""
    import torch

    return torch.cuda.device_count()
