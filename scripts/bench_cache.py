"""`attnzoo bench cache`: retrieval, fidelity and speed of compressed KV caches of equal size."""

import argparse
import subprocess
import sys
from pathlib import Path

from attnzoo.cli import carry_out
from scripts import arguments
from scripts.caches.cli import measure
from scripts.demo import train

CONFIG = "retrieval.yaml"
PEER = Path(__file__).with_name("kvpress_peer.py")


def trained(run_dir: Path) -> Path:
    """The export of the small model; trains it on two ranks first if it does not exist. Raises ValueError if that
    fails."""
    export = run_dir.resolve() / "export"
    if not export.exists():
        try:
            train(CONFIG, run_dir.resolve(), 2, [])
        except subprocess.CalledProcessError as error:
            raise ValueError(
                f"training the small model failed with status {error.returncode} (see its messages above); fix the "
                "cause, or give a --run-dir that has an export"
            ) from None
    return export


def run(options: argparse.Namespace) -> int:
    """Measures and prints tables; exit status 1 if a claim does not hold. Raises ValueError for wrong usage."""
    return measure(options, trained, PEER)


def main(words: list[str] | None = None) -> int:
    """Runs `attnzoo bench cache`; returns the exit status."""
    return carry_out("attnzoo bench cache", arguments.bench_cache, run, sys.argv[1:] if words is None else words)


if __name__ == "__main__":
    raise SystemExit(main())
