"""`attnzoo bench cache`: compressed KV caches at equal bytes: what they find, what they cost, how fast they decode."""

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
    """The export of the small model; trained on two ranks where it is not there. Raises ValueError when that fails."""
    export = run_dir.resolve() / "export"
    if not export.exists():
        try:
            train(CONFIG, run_dir.resolve(), 2, [])
        except subprocess.CalledProcessError as error:
            raise ValueError(
                f"training the small model ended with status {error.returncode} (its messages are above); mend it, or "
                "give a --run-dir that has an export"
            ) from None
    return export


def run(options: argparse.Namespace) -> int:
    """Prints tables and claims; exit status 1 when a claim does not hold. Raises ValueError for wrong usage."""
    return measure(options, trained, PEER)


def main(words: list[str] | None = None) -> int:
    """`attnzoo bench cache`; returns the exit status."""
    return carry_out("attnzoo bench cache", arguments.bench_cache, run, sys.argv[1:] if words is None else words)


if __name__ == "__main__":
    raise SystemExit(main())
