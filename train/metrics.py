"""Writes a run's metrics to metrics.jsonl, TensorBoard and W&B; measures memory and peak FLOP/s."""

import importlib.util
import json
import os
import re
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch

from attnzoo.files import write_atomic
from attnzoo.planner.chips import chip_of
from train.config import Config
from train.config_layers import ConfigError
from train.finite import finite_or_none


def check_wandb(wanted: bool) -> None:
    """Raises ConfigError if W&B is wanted but not installed."""
    if wanted and importlib.util.find_spec("wandb") is None:
        raise ConfigError("log.wandb=true, but the package wandb is not installed: install it or set log.wandb=false")


def peak_flops(config: Config) -> float | None:
    """Peak FLOP/s of one rank's device: log.peak_flops, or the data sheet's for a known GPU in bfloat16; else None."""
    if config.log.peak_flops is not None:
        return config.log.peak_flops
    if torch.cuda.is_available() and config.precision != "fp32":
        chip = chip_of(torch.cuda.get_device_name())
        return None if chip is None else chip.bf16_flops
    return None


def peak_memory_mib() -> float:
    """Peak memory of this rank in MiB: of the allocator on a GPU, of the resident set on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


class MetricsWriter:
    """The metrics writers of rank 0. When a run resumes at `step`, later records are removed from the files."""

    def __init__(self, config: Config, step: int) -> None:
        run = config.run_path
        run.mkdir(parents=True, exist_ok=True)
        self.path, self.samples_path = run / "metrics.jsonl", run / "samples.txt"
        self._written = _cut_records(self.path, step)
        _cut_samples(self.samples_path, step)
        self._file: TextIO = self.path.open("a", encoding="utf-8")
        self._board: Any = None
        self._wandb: Any = None
        if config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)
        if config.log.wandb:
            import wandb

            self._wandb = wandb.init(project="attnzoo", name=config.name, dir=str(run), id=run.name, resume="allow")

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Writes one record and flushes it, so that a killed run keeps it. NaN and infinity become null.

        A record of the same kind and step is not written twice: a finished run that is started again evaluates its last
        step again.
        """
        if (kind, step) in self._written:
            return
        self._written.add((kind, step))
        record = {name: finite_or_none(value) for name, value in values.items()}
        self._file.write(json.dumps({"kind": kind, "step": step, **record}, allow_nan=False) + "\n")
        self._file.flush()
        known = {f"{kind}/{name}": value for name, value in record.items() if value is not None}
        if self._board is not None:
            for name, value in known.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(known, step=step)

    def rewind(self, step: int) -> None:
        """Removes records and samples later than `step`, from which the run goes on."""
        self._file.close()
        self._written = _cut_records(self.path, step)
        _cut_samples(self.samples_path, step)
        self._file = self.path.open("a", encoding="utf-8")

    def write_samples(self, step: int, texts: list[str]) -> None:
        """Appends text samples to samples.txt."""
        with self.samples_path.open("a", encoding="utf-8") as file:
            for text in texts:
                file.write(f"=== step {step} ===\n{text}\n")

    def close(self) -> None:
        """Flushes and closes all writers."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of metrics.jsonl; an incomplete line (of a killed run) is left out.

    Raises ValueError that names the file if no run has written it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if os.path.lexists(path) else []
    except (OSError, UnicodeDecodeError) as error:
        raise _foreign(path, str(error)) from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise _foreign(path, f"line {number} has no step")
        if not isinstance(record.get("kind"), str):
            raise _foreign(path, f"line {number} has no kind")
        records.append(record)
    return records


def _foreign(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} does not hold the metrics of a run ({reason}); move it away, or set another run_dir")


def _cut_records(path: Path, step: int) -> set[tuple[str, int]]:
    """Removes records later than `step`; returns (kind, step) of the others."""
    kept = [r for r in read_metrics(path) if step and r["step"] <= step]
    if path.is_file():
        write_atomic(path, "".join(json.dumps(r) + "\n" for r in kept).encode())
    return {(r["kind"], r["step"]) for r in kept}


def _cut_samples(path: Path, step: int) -> None:
    if not path.is_file():
        return
    content = path.read_bytes()  # a kill may have left half a character
    starts = re.finditer(rb"^=== step (\d+) ===$", content, re.M)
    later = next((m.start() for m in starts if int(m[1]) > step), None)
    write_atomic(path, content[:later])
