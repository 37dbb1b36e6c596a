"""Checkpoints around DeepSpeed's: atomic, complete (random states, data position, schedule) and checked on reading.

    <run dir>/checkpoints/latest                 the name of the newest checkpoint
    <run dir>/checkpoints/step-00000500/         DeepSpeed's files, state.json, random-<rank>.safetensors

A checkpoint is written to a hidden directory, flushed and renamed; `latest` is replaced after that. A run killed
at any moment leaves the previous checkpoint as the latest. DeepSpeed's files are pickles that torch.load executes:
resume only from checkpoints you wrote yourself. (An export, `attnzoo.checkpoint`, holds no pickle.)
"""

import json
import os
import random
import shutil
import signal
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from attnzoo.files import replace_directory, write_atomic
from train.config import Config
from train.engine import Engine

FORMAT = "attnzoo-train-1"
FAULT = "ATTNZOO_FAULT"
"""Tests set ATTNZOO_FAULT=checkpoint_write:<step> to kill rank 0 half way through writing that checkpoint."""


@dataclass
class Progress:
    """What a run needs besides weights and optimizer state to go on as if nothing had happened."""

    step: int = 0
    total_steps: int | None = None
    seconds: float = 0.0
    evaluation_seconds: float = 0.0
    data: dict[str, Any] = field(default_factory=dict)


def identity(config: Config, model: dict[str, Any], tokenizer: str, data: str, world: int) -> dict[str, Any]:
    """The settings that a checkpoint must share with the run that reads it, by dotted key.

    `tokenizer` and `data` are digests of what these hold.
    """
    keys = {f"model.{key}": value for key, value in model.items()}
    keys |= {f"data.{key}": value for key, value in config.data.items()}
    keys |= {
        "tokenizer (content)": tokenizer,
        "data (content)": data,
        "seed": config.seed,
        "precision": config.precision,
        "optim.name": config.optim.name,
        "zero.stage": config.zero.stage,
        **({} if config.lora.rank is None else {f"lora.{key}": value for key, value in asdict(config.lora).items()}),
        "train.batch_size": config.train.batch_size,
        "ranks": world,
    }
    return json.loads(json.dumps(keys))


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, directory: Path, keep: int, settings: dict[str, Any]) -> None:
        self.directory, self.keep, self.settings = directory, keep, settings

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        pointer = self.directory / "latest"
        if not pointer.is_file():
            return None
        path = self.directory / pointer.read_text(encoding="utf-8").strip()
        if not (path / "state.json").is_file():
            raise ValueError(f"{pointer} names {path.name}, which is no complete checkpoint; delete or repair it")
        return path

    def save(self, engine: Engine, progress: Progress) -> Path:
        """Writes a checkpoint (all ranks), makes it the latest, and deletes the oldest beyond `keep`."""
        final = self.directory / f"step-{progress.step:08d}"
        temporary = self.directory / f".{final.name}.tmp"
        if engine.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        engine.barrier()
        engine.save(self.directory, temporary.name)
        save_file(random_state(), str(temporary / f"random-{engine.rank}.safetensors"))
        engine.barrier()
        if engine.rank == 0:
            _fault(progress.step, temporary)
            content = {"format": FORMAT, "progress": asdict(progress), "settings": self.settings}
            (temporary / "state.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            replace_directory(temporary, final)
            write_atomic(self.directory / "latest", f"{final.name}\n".encode())
            self._delete_old()
        engine.barrier()
        return final

    def load(self, engine: Engine, path: Path) -> Progress:
        """Restores weights, optimizer and random states (all ranks); returns where the run was."""
        content = self.read(path)
        engine.load(path.parent, path.name)
        set_random_state(load_file(str(path / f"random-{engine.rank}.safetensors")))
        return Progress(**content["progress"])

    def read(self, path: Path) -> dict[str, Any]:
        """state.json, checked against this run. Raises ValueError that names what differs and the way out."""
        try:
            content = json.loads((path / "state.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"checkpoint.resume: {path} is not a readable checkpoint ({error})") from None
        if content.get("format") != FORMAT:
            raise ValueError(f"{path}: format {content.get('format')!r} is not {FORMAT!r}")
        saved = content["settings"]
        if saved["ranks"] != self.settings["ranks"]:
            raise ValueError(
                f"{path} was written by {saved['ranks']} ranks and this run has {self.settings['ranks']}: optimizer "
                f"states are cut by rank. Start with {saved['ranks']} ranks, or begin a new run from the weights "
                "alone: checkpoint.init_from=<its export directory> with another run_dir"
            )
        for key in sorted(saved.keys() | self.settings.keys()):
            if saved.get(key) != self.settings.get(key):
                raise ValueError(
                    f"{path} was written with {key}={saved.get(key)!r} and this run has {self.settings.get(key)!r}; "
                    f"set it back, or choose another run_dir"
                )
        return content

    def clean(self) -> None:
        """Deletes what interrupted writes left (rank 0)."""
        for leftover in self.directory.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _delete_old(self) -> None:
        for path in sorted(self.directory.glob("step-*"))[: -self.keep]:
            shutil.rmtree(path, ignore_errors=True)


def find_resume(checkpoints: Checkpoints, resume: str) -> Path | None:
    """The checkpoint that checkpoint.resume asks for. Raises ValueError with the way out."""
    if resume == "auto":
        return checkpoints.latest()
    if resume == "never":
        if (found := checkpoints.latest()) is not None:
            raise ValueError(
                f"checkpoint.resume=never, but {checkpoints.directory} holds {found.name}; "
                "set run_dir to a new directory, delete this one, or use checkpoint.resume=auto"
            )
        return None
    path = Path(resume)
    for candidate in (path, path / "checkpoints"):
        if (candidate / "latest").is_file():
            return Checkpoints(candidate, 1, {}).latest()
    if not (path / "state.json").is_file():
        raise ValueError(f"checkpoint.resume={resume}: not auto, never, a checkpoint or a run directory")
    return path


def random_state() -> dict[str, torch.Tensor]:
    """States of torch's, numpy's and python's generators, as tensors."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(numpy_state[1].astype(np.int64)),
        "numpy_position": torch.tensor([numpy_state[2], numpy_state[3]], dtype=torch.int64),
        "numpy_gauss": torch.tensor([numpy_state[4]], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    """Restores what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    version, *words = state["python"].tolist()
    gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    position, has_gauss = state["numpy_position"].tolist()
    words_np = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words_np, position, has_gauss, state["numpy_gauss"].item()))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _fault(step: int, directory: Path) -> None:
    """Dies as from kill -9, with one file cut in half, when a test asks for it."""
    if os.environ.get(FAULT) == f"checkpoint_write:{step}":
        victim = max(directory.iterdir(), key=lambda p: p.stat().st_size)
        os.truncate(victim, victim.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
