"""Runs a model under DeepSpeed, with the same interface for every ZeRO stage. Only this file imports DeepSpeed."""

import contextlib
import fcntl
import logging
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from attnzoo.models import buffer_dtype
from attnzoo.planner.fits import BUCKET
from train.buffers import SavedBuffers
from train.config import Config
from train.data import Batch
from train.deepspeed_config import clips_itself, deepspeed_config
from train.failures import TrainingError, make_directory
from train.finite import GradientCheck, describe, first_non_finite
from train.optim import MatrixAdamW, build_optimizer, set_rate
from train.ranks import agree, check_port, free_port, from_main, gather, port_taken, threads_of_rank
from train.shards import layouts
from train.tasks import Task

DTYPES = {"fp32": torch.float32, "bf16_autocast": torch.float32, "bf16": torch.bfloat16}
"""The dtype of the weights that a rank computes with, by `precision`."""


def start(config: Config, local_rank: int) -> torch.device:
    """Joins the process group (without a launcher: a group of one on a free port) and returns this rank's device.

    It sets environment variables that DeepSpeed reads at import, so it must run before deepspeed is imported. Raises
    ValueError if the port is taken or an extension cannot be compiled, TrainingError if the ranks cannot connect.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str((config.cache_path / "torch_extensions").resolve()))
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(free_port())
    check_port()
    threads = threads_of_rank(config.train.threads)
    if threads is not None:
        torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(max(local_rank, 0))
    deepspeed = _deepspeed()
    if not torch.cuda.is_available():
        if os.environ["WORLD_SIZE"] == "1":
            # The extension only moves tensors between ranks, so that one rank needs no compiler.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        else:
            _load_extension(Path(os.environ["TORCH_EXTENSIONS_DIR"]))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    try:
        # The watchdog limits how long ranks wait for each other, not this timeout.
        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timedelta(days=30))
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise port_taken(os.environ["MASTER_PORT"]) from None
        raise TrainingError(f"the ranks did not find each other at {os.environ['MASTER_ADDR']}: {error}") from None
    if not torch.cuda.is_available():
        _unlink_buffers()
    return torch.device("cuda", max(local_rank, 0)) if torch.cuda.is_available() else torch.device("cpu")


def _load_extension(directory: Path) -> None:
    """Compiles (once) and loads DeepSpeed's extension for collectives between CPU ranks. Raises ValueError.

    torch guards a build with a file named lock. A killed process leaves it behind, and every later launch would wait
    for it. This function holds an flock, which the system releases with its process: while it holds the flock no build
    is running, so that a lock file is a leftover and is removed.
    """
    from deepspeed.ops.op_builder import ShareMemCommBuilder

    # Use the ninja of this Python environment even if it is not activated: another version of ninja would compile
    # everything again.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    make_directory(directory, "cache_dir, or TORCH_EXTENSIONS_DIR")
    with (directory / "guard").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        for leftover in directory.glob("*/lock"):
            leftover.unlink()
        if os.environ["RANK"] == "0" and not any(directory.glob("deepspeed_shm_comm/*.so")):
            print("compiling what the ranks talk through: once, a minute or two; one rank needs none", file=sys.stderr)
        try:
            ShareMemCommBuilder().load()
        except (RuntimeError, OSError, ImportError, SystemExit, subprocess.CalledProcessError) as error:
            compiler = os.environ.get("CXX", "c++")
            reason = str(error).strip().splitlines()
            raise ValueError(
                f"the ranks of one machine need a library that is compiled once, with a C++ compiler, and that failed "
                f"({reason[-1] if reason else type(error).__name__}): install one that is called {compiler} (Debian: "
                "apt-get install g++), or train on one rank, which needs none: python train/main.py"
            ) from error


def _unlink_buffers() -> None:
    """Unlinks DeepSpeed's shared memory buffers (66 MiB a rank) after all ranks of the machine have mapped them.

    DeepSpeed never removes them. Without a name they are freed when the processes end.
    """
    dist.barrier()
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_{host}_{port}_*"):
        buffer.unlink(missing_ok=True)


def _deepspeed() -> Any:
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19 uses names of collectives that torch 2.13 deprecates; a user can do nothing about that.
    warnings.filterwarnings("ignore", message=".*(all_gather_into|reduce_scatter)_tensor.*", category=FutureWarning)
    return deepspeed


class TaskModule(nn.Module):
    """The module that DeepSpeed wraps: its forward returns the task's loss of a batch, or without `count` what the task
    measures. autocast: the device of bfloat16 autocast, or None."""

    def __init__(self, task: Task, model: nn.Module, autocast: torch.device | None) -> None:
        super().__init__()
        self.task, self.model, self.autocast = task, model, autocast

    def forward(self, *batch: Tensor, count: Tensor | None = None) -> Tensor:
        with torch.autocast(self.autocast.type, torch.bfloat16) if self.autocast else contextlib.nullcontext():
            if count is None:
                return self.task.measure(self.model, batch)
            return self.task.loss(self.model, batch, count)


@contextlib.contextmanager
def _without_axes(model: nn.Module, stage: int) -> Iterator[None]:
    """Lets DeepSpeed initialize a model with 0-dimensional parameters. DeepSpeed broadcasts parameters as bytes, and
    torch cannot view a 0-dimensional tensor as bytes. So this function broadcasts them itself. For stage 3 they get one
    axis meanwhile; for other stages an attribute makes DeepSpeed skip their broadcast."""
    single = [parameter for parameter in model.parameters() if parameter.dim() == 0]
    for parameter in single:
        dist.broadcast(parameter.data, 0)
        if stage == 3:
            parameter.data = parameter.data.view(1)
        else:
            parameter.ds_optim_param = None  # type: ignore[attr-defined]
    yield
    for parameter in single:
        if stage == 3:
            parameter.ds_shape = torch.Size([])  # type: ignore[attr-defined]
        else:
            del parameter.ds_optim_param  # type: ignore[attr-defined]


class TrainingEngine:
    """Model and optimizer on all ranks. Every rank must call every method, unless its docstring says otherwise."""

    def __init__(self, task: Task, model: nn.Module, device: torch.device) -> None:
        config = task.config
        self.rank, self.world, self.device = dist.get_rank(), dist.get_world_size(), device
        self.stage = config.zero.stage
        self.task = task
        self._clipping = config.train.gradient_clipping if clips_itself(config) else None
        settings = deepspeed_config(config, self.world)
        # DeepSpeed allocates its whole gradient bucket even for a small model.
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        settings["zero_optimization"]["reduce_bucket_size"] = min(BUCKET, trained)
        self.accumulation: int = settings["gradient_accumulation_steps"]
        self.model = model.to(device)
        optimizer = build_optimizer(model, config.optim)
        autocast = device if config.precision == "bf16_autocast" else None
        module = TaskModule(task, model, autocast)
        self._saved_buffers = SavedBuffers(model)
        with _quiet(), _without_axes(model, self.stage):
            self._engine, *_ = _deepspeed().initialize(model=module, optimizer=optimizer, config=settings)
        self.optimizer: MatrixAdamW = self._engine.basic_optimizer
        self._forget_first_step()
        if any(group["orthogonal"] for group in self.optimizer.param_groups):
            self.optimizer.layouts.update(layouts(self._engine.optimizer, self.stage, self.optimizer))
        self._gradients = GradientCheck(self.model)
        if config.train.compile:
            self._engine.compile()

    # --- one step -----------------------------------------------------------------------------------------------

    def forward_backward(self, batch: Batch, targets: float) -> Tensor:
        """Adds the gradient of one micro-batch. targets: number of targets in the whole global batch.

        Returns the loss, detached, scaled so that its mean over passes and ranks is the mean over all targets.
        """
        # DeepSpeed averages over passes and ranks whatever their numbers of targets. So each pass divides its sum of
        # losses by an equal share of the targets.
        share = torch.tensor(max(targets, 1.0) / (self.accumulation * self.world), device=self.device)
        loss: Tensor = self._engine(*self._here(batch), count=share)
        self._engine.backward(loss)
        # DeepSpeed counts these calls, and reduces and updates only at the boundary of accumulation (see `step`).
        boundary = self._engine.is_gradient_accumulation_boundary()
        if not boundary:
            self._engine.step()
        return loss.detach()

    def non_finite_gradients(self) -> list[str]:
        """Names of parameters whose gradient on this rank had NaN or infinity since the last call."""
        return self._gradients.names()

    def step(self, factor: float, skip: bool = False) -> float:
        """Updates the weights with `factor` times the peak learning rates; returns the gradient norm before clipping.

        With `skip` (the same on all ranks), or if the norm is not finite, nothing is updated at any ZeRO stage, and the
        returned norm is not finite.
        """
        set_rate(self.optimizer, factor)
        norm = math.nan
        if self._clipping is not None and not skip:
            # `backward` has summed the gradients over the ranks.
            norm = float(nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]))
            if self._clipping and math.isfinite(norm):
                nn.utils.clip_grads_with_norm_(self.model.parameters(), self._clipping, torch.tensor(norm))
            skip = not math.isfinite(norm)
        self.optimizer.paused = skip
        try:
            self._engine.step()
        finally:
            self.optimizer.paused = False
        self._saved_buffers.share()
        if skip or not self._engine.was_step_applied():
            return math.nan
        return norm if self._clipping is not None else float(self._engine.get_global_grad_norm())

    def describe_skip(self, step: int, loss: float, names: list[str]) -> str:
        """A message that says on which ranks the loss or which gradients were not finite. names: from this rank."""
        losses, found = zip(*gather((loss, names)), strict=True)
        return describe(step, list(losses), list(found))

    @torch.no_grad()
    def measure(self, batch: Batch) -> Tensor:
        """What the task measures of a batch, in float32 on the CPU."""
        measured: Tensor = self._engine(*self._here(batch))
        return measured.float().cpu()

    def _here(self, batch: Batch) -> Batch:
        """The batch on this rank's device."""
        return tuple(tensor.to(self.device) for tensor in batch)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """A context in evaluation mode; afterwards every module gets its earlier mode back."""
        modes = [(module, module.training) for module in self._engine.modules()]
        self._engine.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode

    # --- ranks --------------------------------------------------------------------------------------------------

    def sum(self, *values: float) -> list[float]:
        """Sums each value over the ranks, in float64."""
        if self.world == 1:
            return list(values)
        totals = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        return totals.tolist()

    def from_main(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        return from_main(value)

    def barrier(self) -> None:
        """Waits for every rank."""
        dist.barrier()

    def check_finite(self, consequence: str) -> None:
        """Raises AgreedError that names the tensor and the rank if weights or optimizer state are not finite.
        consequence: the end of the message."""

        def look() -> None:
            name = first_non_finite(self._state())
            if name is not None:
                raise TrainingError(f"{name} is not finite: {consequence}")

        agree(look)

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, tensor) of the weights and optimizer state that this rank holds."""
        for name, parameter in self.model.named_parameters():
            yield name, getattr(parameter, "ds_tensor", parameter)  # at stage 3 the part of this rank
        for master, state in self.optimizer.state.items():
            yield "a float32 copy of weights", master
            yield from ((f"the optimizer's {key}", value) for key, value in state.items() if torch.is_tensor(value))

    # --- weights and checkpoints --------------------------------------------------------------------------------

    def full_state(self) -> dict[str, Tensor] | None:
        """All weights in float32 (from master copies) and saved buffers, on the CPU of rank 0; None on other ranks."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        found: dict[str, Tensor] = {}
        first: dict[int, str] = {}
        masters = self._unfused_masters()
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if id(parameter) in first:  # the parameter has two names; it is gathered once
                found |= {name: found[first[id(parameter)]]} if self.rank == 0 else {}
                continue
            first[id(parameter)] = name
            if self.stage == 3 and not parameter.requires_grad:
                with GatheredParameters([parameter]):
                    weight = parameter.detach().clone()
            elif self.stage == 0 or not parameter.requires_grad:
                weight = masters.get(id(parameter), parameter)
            else:
                weight = safe_get_full_fp32_param(parameter)
            if self.rank == 0:
                whole = weight.detach().cpu()
                found[name] = whole.float().clone() if whole.is_floating_point() else whole.clone()
        if self.rank != 0:
            return None
        for name, buffer in self._saved_buffers.items():
            found[name] = buffer.to(buffer_dtype(buffer.dtype, torch.float32)).detach().cpu().clone()
        return found

    def full_model(self) -> nn.Module | None:
        """A float32 copy of the model on the CPU of rank 0, adapters merged; None on other ranks."""
        state = self.full_state()
        return None if state is None else self.task.rebuilt(self.model, state)

    def _forget_first_step(self) -> None:
        """Undoes the step with zero gradients that DeepSpeed takes, in bf16 without ZeRO, to create optimizer states.

        Otherwise the optimizer would count one step too many, and weight decay would apply once too often.
        """
        if self.stage == 0 and hasattr(self._engine.optimizer, "refresh_fp32_params"):
            self.optimizer.state.clear()
            self._engine.optimizer.refresh_fp32_params()

    def _unfused_masters(self) -> dict[int, Tensor]:
        """The float32 copies of bf16 weights that DeepSpeed keeps without ZeRO, by id of the weight."""
        wrapper = self._engine.optimizer
        if self.stage or not hasattr(wrapper, "fp32_groups"):
            return {}
        pairs = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
        return {id(low): full for lows, fulls in pairs for low, full in zip(lows, fulls, strict=True)}

    def save(self, directory: Path, tag: str) -> None:
        """Writes weights and optimizer state of all ranks to directory/tag. Not atomic: see train.checkpoint."""
        with _quiet():
            self._engine.save_checkpoint(str(directory), tag=tag, save_latest=False)

    def load(self, path: Path) -> None:
        """Reads a checkpoint of `save` with the same ranks and ZeRO stage. Raises ValueError if there is none."""
        # The checkpoint's learning rates are replaced by those of this run's configuration.
        options = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        # DeepSpeed takes the path for a glob pattern, which fails for a path with [ ]; so it gets ".".
        with _quiet(), contextlib.chdir(path):
            found, _ = self._engine.load_checkpoint(".", tag=".")
        if found is None:
            raise ValueError(f"{path} holds no DeepSpeed checkpoint")
        for group, mine in zip(self.optimizer.param_groups, options, strict=True):
            group.update(mine)


@contextlib.contextmanager
def _quiet() -> Any:
    """Hides DeepSpeed's progress reports, and its warning that the optimizer is untested (tests compare all ZeRO stages
    with it). Other warnings stay."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    logger.addFilter(_not_about_optimizer)
    try:
        yield
    finally:
        logger.removeFilter(_not_about_optimizer)
        logger.setLevel(level)


def _not_about_optimizer(record: logging.LogRecord) -> bool:
    return "untested optimizer" not in record.getMessage()
