"""Training checkpoints: DeepSpeed's files with random states, data position and progress, atomic and with digests.

    <run dir>/checkpoints/latest                 the name of the newest checkpoint
    <run dir>/checkpoints/step-00000500/         DeepSpeed's files, state.json, random-<rank>.safetensors, digests.json
    <run dir>/checkpoints/set-aside-1/           later steps of a run that was rolled back; they are never deleted

A checkpoint is written to a hidden directory, flushed and renamed; then `latest` is replaced. If a run is killed, the
latest complete checkpoint stays valid. DeepSpeed's files are pickles, which torch.load executes: resume only from
checkpoints that you have written. (Exports, `attnzoo.checkpoint`, hold no pickle.)
"""

import itertools
import json
import os
import re
import shutil
import signal
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from attnzoo.checkpoint.sources import changed_sources
from attnzoo.files import replace_directory, user_path, write_atomic
from attnzoo.report import counted
from train.best_weights import BestWeights
from train.config import CheckpointConfig, Config
from train.digests import NAME, check_files, digest_files, write_digests
from train.engine import TrainingEngine
from train.failures import MISTAKE, AgreedError, TrainingError, explain, free_bytes, lost_rank
from train.random_state import random_state, set_random_state
from train.ranks import agree, decide, gather

FORMAT = "attnzoo-train-2"
FAULT = "ATTNZOO_FAULT"
"""Tests set ATTNZOO_FAULT=checkpoint_write:<step> to kill rank 0 while it writes that checkpoint."""
LATEST = "latest"
PLUGINS = "plugins"
"""The setting that holds `attnzoo.checkpoint.sources.plugin_sources`."""
STEP_NAME = r"step-\d{8,}"


@dataclass
class TrainingProgress:
    """The state of a run besides weights and optimizer state, so that it can resume exactly.

    seconds: of training so far. skipped: steps without an update so far, because they were not finite. pass_seconds:
    median pass of the last evaluation. evaluated: its step. step_seconds: of each step, until train.max_minutes is
    turned into `budget` (a `train.budget.Budget`). validation: result on all validation rows at this step. selected: as
    `BestWeights.scores`. data: position in the data.
    """

    step: int = 0
    total_steps: int | None = None
    seconds: float = 0.0
    evaluation_seconds: float = 0.0
    pass_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    budget: dict[str, Any] | None = None
    validation: dict[str, float] | None = None
    evaluated: int = -1
    selected: list[list[float]] = field(default_factory=list)
    skipped: int = 0
    data: dict[str, Any] = field(default_factory=dict)


def identity(config: Config, content: dict[str, Any], world: int) -> dict[str, Any]:
    """The settings that must be the same in a checkpoint and in the run that reads it, by dotted key. content: those of
    the task (`Task.content`)."""
    keys = {
        **content,
        "seed": config.seed,
        "precision": config.precision,
        "optim.name": config.optim.name,
        "zero.stage": config.zero.stage,
        **({} if config.lora.rank is None else {f"lora.{key}": value for key, value in asdict(config.lora).items()}),
        "train.batch_size": config.train.batch_size,
        "ranks": world,
    }
    return json.loads(json.dumps(keys))


def steps_in(directory: Path) -> list[Path]:
    """The checkpoint directories in a directory, oldest first; other names are ignored."""
    found = (p for p in directory.glob("step-*") if re.fullmatch(STEP_NAME, p.name) and p.is_dir())
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def check_whole(path: Path, share: int = 0, shares: int = 1) -> None:
    """`check_files`, and whether the step in a checkpoint is that of its name, which says what is newest.

    Raises ValueError that names what is wrong, for a directory that was renamed with its name.
    """
    check_files(path, share, shares)
    try:
        step = json.loads((path / "state.json").read_text(encoding="utf-8"))["progress"]["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # `Checkpoints.read` says what is wrong with it
    if re.fullmatch(STEP_NAME, path.name) and step != _step(path):
        raise ValueError(
            f"{path} holds step {step}: the directory was renamed; give it its name back, {step_name(step)}"
        )


def step_name(step: int) -> str:
    """The name of a checkpoint's directory."""
    return f"step-{step:08d}"


def newest_whole(directory: Path, before: Path | None = None) -> Path | None:
    """The newest checkpoint whose files all match their digests. before: only look at older ones than this."""
    known = steps_in(directory)
    if before in known:
        known = known[: known.index(before)]
    for path in reversed(known):
        try:
            check_whole(path)
        except (ValueError, OSError):
            continue
        return path
    return None


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, directory: Path, keep: int, settings: dict[str, Any], best: BestWeights | None = None) -> None:
        """best: what is saved and loaded beside the run's state; None: nothing."""
        self.directory, self.keep, self.settings = directory, keep, settings
        self.best = BestWeights(0) if best is None else best

    def latest(self) -> Path | None:
        """The checkpoint that the file `latest` names, or None if there are no checkpoints.

        Raises ValueError that names the newest undamaged checkpoint if the file is missing or wrong.
        """
        pointer = self.directory / LATEST
        if not pointer.is_file():
            if not steps_in(self.directory):
                return None
            problem = f"{self.directory} holds checkpoints, but no file {LATEST} that names one"
            raise ValueError(f"{problem}; {self.offer()}")
        name = pointer.read_text(encoding="utf-8", errors="replace").strip()
        path = self.directory / name
        if path not in steps_in(self.directory):
            raise ValueError(f"{pointer} names {name!r}, which is no checkpoint there; {self.offer()}")
        return path

    def offer(self, before: Path | None = None) -> str:
        """The end of an error message: which other checkpoint can be used. before: as in `newest_whole`."""
        found = newest_whole(self.directory, before)
        if found is None:
            return "no other checkpoint there is whole: set another run_dir"
        return (
            f"the newest whole one is {found.name}: checkpoint.resume={found} takes it, checkpoint.fallback=true takes "
            "the newest whole one by itself"
        )

    def newest_name(self) -> str | None:
        """The name of the newest checkpoint for messages; None if there is none."""
        return next((path.name for path in reversed(steps_in(self.directory))), None)

    def save(self, engine: TrainingEngine, progress: TrainingProgress) -> Path:
        """Writes a checkpoint (all ranks), makes it the latest, and deletes older ones beyond `keep`.

        Raises AgreedError if weights or optimizer state are not finite, TrainingError if writing fails.
        """
        final = self.directory / step_name(progress.step)
        engine.check_finite(f"checkpoint {final.name} is not written")
        temporary = self.directory / f".{final.name}.tmp"
        try:
            self._write(engine, progress, temporary)
            engine.barrier()
            if engine.rank == 0:
                replace_directory(temporary, final)
                write_atomic(self.directory / LATEST, f"{final.name}\n".encode())
                self._delete_old(final)
        except (OSError, RuntimeError, SafetensorError) as error:
            if lost_rank(error):
                raise
            raise self._unwritten(final, error) from error
        engine.barrier()
        return final

    def _write(self, engine: TrainingEngine, progress: TrainingProgress, temporary: Path) -> None:
        if engine.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        engine.barrier()
        engine.save(self.directory, temporary.name)
        save_file(random_state(), str(temporary / f"random-{engine.rank}.safetensors"))
        if engine.rank == 0:
            self.best.save(temporary)
            progress.selected = self.best.scores
            content = {"format": FORMAT, "progress": asdict(progress), "settings": self.settings}
            (temporary / "state.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        engine.barrier()
        shares = gather(digest_files(temporary, engine.rank, engine.world))
        if engine.rank == 0:
            _fault(progress.step, temporary)
            write_digests(temporary, {name: entry for share in shares for name, entry in share.items()})

    def _unwritten(self, final: Path, error: Exception) -> TrainingError:
        """The error for a checkpoint that could not be written. It states the free space, because torch reports a full
        disk only as a RuntimeError."""
        kept = self.newest_name()
        resume = "" if kept is None else f"the newest checkpoint is {kept}, and the same command resumes from it"
        free = free_bytes(self.directory) / 2**20
        return TrainingError(
            f"checkpoint {final} could not be written: {explain(error)} ({free:,.0f} MiB are free there); {resume}"
        )

    def choose(self, path: Path, engine: TrainingEngine, fallback: bool) -> Path:
        """`path` if its files match their digests, else, with `fallback`, the newest undamaged older one (all ranks).

        Raises AgreedError that names the damaged file and the newest undamaged checkpoint.
        """
        try:
            agree(lambda: check_whole(path, engine.rank, engine.world))
            return path
        except AgreedError as error:
            problem, there = f"checkpoint {path.name} is damaged: {error}", Checkpoints(path.parent, 1, {})

        def other() -> Path:
            found = newest_whole(path.parent, path) if fallback else None
            if found is None:
                raise ValueError(f"{problem}; {there.offer(path)}")
            tqdm.write(f"{problem}; checkpoint.fallback takes {found.name}", file=sys.stderr)
            return found

        return decide(other)

    def load(self, engine: TrainingEngine, path: Path) -> TrainingProgress:
        """Restores weights, optimizer state and random states (all ranks), and returns the progress."""
        content = agree(lambda: self.read(path))
        load_weights(engine, path)
        set_random_state(load_file(str(path / f"random-{engine.rank}.safetensors")))
        progress = TrainingProgress(**content["progress"])
        self.best.load(path, progress.selected, engine.rank == 0)
        return progress

    def read(self, path: Path) -> dict[str, Any]:
        """The content of state.json. Raises ValueError if it cannot be read or its settings differ from this run's."""
        try:
            content = json.loads((path / "state.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"checkpoint.resume: {path} is not a readable checkpoint ({error})") from None
        if content.get("format") != FORMAT:
            raise ValueError(f"{path}: format {content.get('format')!r} is not {FORMAT!r}")
        saved = content["settings"]
        _check_sources(path, saved)
        if saved["ranks"] != self.settings["ranks"]:
            raise ValueError(
                f"{path} was written by {counted(saved['ranks'], 'rank')} and this run has {self.settings['ranks']}: "
                f"optimizer states are cut by rank. Start with {counted(saved['ranks'], 'rank')}, or begin a new run "
                "from the weights alone: checkpoint.init_from=<its export directory> with another run_dir"
            )
        for key in sorted((saved.keys() | self.settings.keys()) - {PLUGINS}):
            if saved.get(key) != self.settings.get(key):
                raise ValueError(
                    f"{path} was written with {key}={saved.get(key)!r} and this run has {self.settings.get(key)!r}; "
                    f"set it back, or choose another run_dir"
                )
        return content

    def set_aside(self, path: Path, others: list[Path]) -> Path | None:
        """Moves checkpoints that do not lead to `path`, from which this run resumes, to a new directory (rank 0).

        These are the later steps or, if `path` is from another run directory, all checkpoints here. Copies of `others`
        (metrics and samples, which will be cut back) go with them. Returns the directory, or None if none was moved.
        """
        known = steps_in(self.directory)
        own = path.resolve() in [p.resolve() for p in known]
        later = [p for p in known if not own or _step(p) > _step(path)]
        if own:
            write_atomic(self.directory / LATEST, f"{path.name}\n".encode())
        if not later:
            return None
        number = next(n for n in itertools.count(1) if not (self.directory / f"set-aside-{n}").exists())
        place = self.directory / f"set-aside-{number}"
        place.mkdir()
        for step in later:
            os.rename(step, place / step.name)
        for other in others:
            if other.is_file():
                shutil.copy2(other, place / other.name)
        if not own:
            (self.directory / LATEST).unlink(missing_ok=True)
        return place

    def _delete_old(self, newest: Path) -> None:
        for path in steps_in(self.directory)[: -self.keep]:
            if path != newest:
                shutil.rmtree(path, ignore_errors=True)


def load_weights(engine: TrainingEngine, path: Path) -> None:
    """Weights and optimizer state. Raises AgreedError if they are those of another model, which every rank sees."""
    try:
        engine.load(path)
    except RuntimeError as error:
        if "state_dict" not in str(error):  # how torch begins to say which parameters are missing or too many
            raise
        first = " ".join(str(error).split()[:40])
        raise AgreedError(
            MISTAKE,
            f"{path} does not fit the model: its code has changed since, or the files are of another; choose another "
            f"name= or run_dir=, or delete {path.parent.parent} to train anew ({first} ...)",
        ) from None


def _check_sources(path: Path, saved: dict[str, Any]) -> None:
    """Raises ValueError if a plug-in variant is not the one that a checkpoint was written with."""
    for kind, file in changed_sources(saved.get(PLUGINS)):
        raise ValueError(
            f"{file} has changed since {path} was written, by another {kind!r}; choose another name= or run_dir=, or "
            f"put {file} back, or delete {path.parent.parent} to train anew"
        )


def check_resume(directory: Path, options: CheckpointConfig) -> None:
    """Raises the ValueError of `find_resume` before anything is prepared. directory: the run's checkpoints."""
    if any(directory.glob(".*.old")):
        return  # a run was killed between two renames; `run_directory` repairs that before `find_resume`
    find_resume(Checkpoints(directory, options.keep, {}), options.resume, options.fallback, tell=False)


def find_resume(checkpoints: Checkpoints, resume: str, fallback: bool, tell: bool = True) -> Path | None:
    """The checkpoint to resume from, by checkpoint.resume; None to begin anew. tell: print a note if `fallback` takes
    another one. Raises ValueError if it does not exist."""
    if resume == "auto":
        return _latest(checkpoints, fallback, tell)
    if resume == "never":
        found = steps_in(checkpoints.directory)
        if found:
            raise ValueError(
                f"checkpoint.resume=never, but {checkpoints.directory} holds {found[-1].name}; "
                "set run_dir to a new directory, delete this one, or use checkpoint.resume=auto"
            )
        return None
    path = user_path(resume, "checkpoint.resume").resolve()
    for candidate in (path, path / "checkpoints"):
        if (candidate / LATEST).is_file() or steps_in(candidate):
            return _latest(Checkpoints(candidate, 1, {}), fallback, tell)
    if not any((path / name).is_file() for name in ("state.json", NAME)):
        raise ValueError(f"checkpoint.resume={resume}: not auto, never, a checkpoint or a run directory")
    return path


def _latest(checkpoints: Checkpoints, fallback: bool, tell: bool) -> Path | None:
    try:
        return checkpoints.latest()
    except ValueError as error:
        found = newest_whole(checkpoints.directory) if fallback else None
        if found is None:
            raise
        if tell:
            tqdm.write(f"{error}; checkpoint.fallback takes {found.name}", file=sys.stderr)
        return found


def _fault(step: int, directory: Path) -> None:
    """For tests: cuts the largest file in half and kills this process, if `FAULT` names this step."""
    if os.environ.get(FAULT) == f"checkpoint_write:{step}":
        victim = max(directory.iterdir(), key=lambda p: p.stat().st_size)
        os.truncate(victim, victim.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
