"""The seam between the training loop and what it trains: `Task`. One kind of task is one file of this folder.

Loop, engine, checkpoints, evaluation and --dry-run use what stands here, and know nothing else of a task. The calls of
a run, in order:

    task = build_task(config)          the options were checked when the configuration was read
    task.check()                       --dry-run ends after this, with what task.plan(task.shapes(), ranks) says
    task.prepare(...)                  data in memory or on disk; from now on task.train gives batches
    model = task.model()               the same initial weights on every rank
    task.loss(model, batch, count)     in every training pass
    task.measure(model, batch)         in every pass of an evaluation; then once task.metrics(all of it)
    task.save(directory, model, ...)   the export
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnzoo.models.shapes import without_storage
from attnzoo.registry import Registry
from train.config import Config
from train.data.base import Batch, Batches
from train.lora import add_adapters
from train.plot import plot_losses
from train.tasks.findings import Findings


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """The section `task` of a configuration. kind: what is trained; it decides what the sections `model`, `data` and
    `tokenizer` hold."""

    kind: str = "language"


class Task(ABC):
    """What a run trains. A subclass reads its options in `__init__`, and no files before `check`.

    B stands for the rows of a batch: what passes and ranks cut, and what `train.batch_size` counts. Methods run on
    every rank and do not communicate. An error for the user is a ValueError that names the key.
    """

    ROW: str
    """What a row is called: sequence, stay, image."""
    UNIT: str
    """What throughput counts: token, stay, image."""
    METRICS: ClassVar[tuple[str, ...]]
    """Names of the metrics, "loss" first."""
    UNUSED: ClassVar[tuple[str, ...]] = ()
    """Keys and sections of a configuration that this kind of task has no use for, and therefore refuses."""
    NEXT: ClassVar[str] = ""
    """The end of a run's last line: what can be done with its directory, {run}."""

    units_per_row: int = 1
    preparing: str
    """What `prepare` prepares, in words."""
    train: Batches
    """The training batches; `prepare` sets it."""
    findings: Findings = Findings()
    """What `save` has found beside the metrics."""

    def __init__(self, config: Config) -> None:
        self.config = config

    # --- before anything is prepared ----------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def sections(cls, config: Config) -> Mapping[str, Callable[[], object]]:
        """What checks each free section (task, model, data, tokenizer), and other keys that the task limits."""

    @abstractmethod
    def check(self) -> None:
        """Raises ValueError if the run could not be carried out: missing files, options that do not fit together."""

    def check_rows(self) -> None:
        """Raises ValueError where what `check` has read is less than one global batch. A task that knows its rows only
        after `prepare` leaves it to `train.checks.check_batches`."""
        return

    def shapes(self) -> nn.Module:
        """The model that will be trained, without storage (device meta)."""
        with without_storage():
            return self.model()

    def plan(self, model: nn.Module, world: int) -> tuple[str, str]:
        """(the numbers of weights of a model without storage, the memory of one of `world` ranks), in words."""
        weights = sum(parameter.numel() for parameter in model.parameters())
        return f"{weights:,} in all", "memory: there is no plan of it for this task; metrics.jsonl has a run's peak"

    # --- data ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def prepare(self, is_main: bool) -> None:
        """Makes the data ready, and sets `train`. Rank 0 calls it first and alone (is_main): what it writes to the
        cache, the others find there."""

    @abstractmethod
    def content(self) -> dict[str, Any]:
        """What must be the same when a run resumes, besides what every task has: options of the model and the task, and
        digests of the data, by the key or name that messages use. Values are JSON."""

    @abstractmethod
    def validation(self, most: int | None = None) -> Batch:
        """All validation rows as one batch, or `most` of them."""

    # --- model and loss -----------------------------------------------------------------------------------------

    @abstractmethod
    def model(self) -> nn.Module:
        """A new model, with its weights drawn from torch's global random state or read from a checkpoint."""

    def flops(self, model: nn.Module) -> int | None:
        """FLOPs of one training step over all ranks; None if unknown."""
        return None

    def add_adapters(self, model: nn.Module) -> None:
        """Adds the adapters of the section `lora`, and freezes what they stand for. Raises ValueError."""
        add_adapters(model, self.config.lora)

    def rebuilt(self, model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
        """A model like `model` with the weights of `state` (float32, of all ranks), on the CPU in evaluation mode.
        `model` itself may have no whole weights, as under ZeRO 3."""
        with torch.random.fork_rng(devices=[]):
            made = self.model()
        made.load_state_dict(state)
        return made.eval()

    def count(self, batch: Batch) -> int:
        """Number of targets in a batch, over whose sum in all passes and ranks the loss is the mean."""
        return len(batch[0])

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, count: Tensor) -> Tensor:
        """The sum of the losses of the batch's targets, divided by `count` []: a tensor [], with gradient."""

    # --- evaluation ---------------------------------------------------------------------------------------------

    @abstractmethod
    def measure(self, model: nn.Module, batch: Batch) -> Tensor:
        """What `metrics` needs of one pass, of any shape [rows, ...]; the passes are concatenated along the first axis.
        For example the predictions [B, ...] of each row, or the sum of the losses [1]."""

    @abstractmethod
    def metrics(self, batch: Batch, measured: Tensor) -> dict[str, float]:
        """The metrics by name (`METRICS`). batch: all rows that were evaluated; measured: in the order of the rows."""

    def score(self, metrics: dict[str, float]) -> float:
        """What is higher the better the model is; `eval.keep_best` chooses by it."""
        return -metrics["loss"]

    def samples(self, model: nn.Module, seed: int) -> list[str]:
        """Texts that show what the model does, for samples.txt (`sample.every`). Rank 0 alone."""
        raise NotImplementedError(f"{type(self).__name__} lists `sample` in UNUSED or defines samples")

    # --- results ------------------------------------------------------------------------------------------------

    @abstractmethod
    def check_target(self, directory: Path) -> None:
        """Raises ValueError if `save` may not replace the directory."""

    @abstractmethod
    def save(self, directory: Path, model: nn.Module, metadata: dict[str, Any]) -> None:
        """Writes the export: all that is needed to load the model and to use it; replaces an earlier one at the end.
        metadata: steps, metrics and name of the run. Rank 0 alone."""

    def summary(self) -> dict[str, Any]:
        """About the data, for training.json: numbers are printed too; "data" says what was read and what left out."""
        return {"data": {}}

    def figure(self) -> Path:
        """Draws loss.png."""
        return plot_losses(self.config.run_path, None, self.config.name)


TASKS: Registry[type[Task]] = Registry("task.kind")
