"""The only file that imports DeepSpeed: hides its differences between ZeRO stages."""

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

from attnzoo.models import DecoderLM, buffer_dtype, build_shapes, fill_buffers
from attnzoo.ops.common.masks import marked_starts
from attnzoo.planner.fits import BUCKET
from train.config import Config
from train.deepspeed_config import clips_itself, deepspeed_config
from train.failures import TrainingError, make_directory
from train.finite import GradientCheck, describe, first_non_finite
from train.lora import add_adapters, merge_adapters
from train.optim import MatrixAdamW, build_optimizer, set_rate
from train.ranks import agree, check_port, free_port, from_main, gather, port_taken
from train.shards import layouts

DTYPES = {"fp32": torch.float32, "bf16_autocast": torch.float32, "bf16": torch.bfloat16}
"""The dtype of the weights a rank computes with, by `precision`."""


def start(config: Config, local_rank: int) -> torch.device:
    """Joins the ranks (or makes a group of one, on a free port) and returns this rank's device.

    Sets what DeepSpeed reads from the environment, so it must run before anything imports deepspeed.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str((config.cache_path / "torch_extensions").resolve()))
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(free_port())
    check_port()
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(max(local_rank, 0))
    deepspeed = _deepspeed()
    if not torch.cuda.is_available():
        if os.environ["WORLD_SIZE"] == "1":
            # What is compiled only moves tensors between ranks: one rank needs no compiler.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        else:
            _load_extension(Path(os.environ["TORCH_EXTENSIONS_DIR"]))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    try:
        # How long ranks may wait for each other is the watchdog's to say, by phase.
        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timedelta(days=30))
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise port_taken(os.environ["MASTER_PORT"]) from None
        raise TrainingError(f"the ranks did not find each other at {os.environ['MASTER_ADDR']}: {error}") from None
    if not torch.cuda.is_available():
        _unlink_buffers()
    return torch.device("cuda", max(local_rank, 0)) if torch.cuda.is_available() else torch.device("cpu")


def _load_extension(directory: Path) -> None:
    """Compiles (once) and loads the collective that DeepSpeed uses between CPU ranks, before the ranks join.

    torch guards a build by a file named lock, which a killed process leaves behind: every later launch would wait
    for it for ever. The system drops an flock with the process that holds it; so under ours no build is running, and
    a lock that is there is a leftover.
    """
    from deepspeed.ops.op_builder import ShareMemCommBuilder

    # The ninja that is installed beside this Python, whether the environment is activated or not: another version
    # distrusts the first one's log and compiles everything again.
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
    """Removes the names of DeepSpeed's shared buffers (66 MiB a rank) once all ranks of the machine have them mapped.

    DeepSpeed never does, so every launch would leave them in memory; without a name they end with the processes.
    """
    dist.barrier()
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_{host}_{port}_*"):
        buffer.unlink(missing_ok=True)


def _deepspeed() -> Any:
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # torch 2.13 renames the collectives that DeepSpeed 0.19 moves cut weights with; nothing a user could do about it.
    warnings.filterwarnings("ignore", message=".*(all_gather_into|reduce_scatter)_tensor.*", category=FutureWarning)
    return deepspeed


class LossModule(nn.Module):
    """The model behind one forward that returns its loss: what DeepSpeed wraps."""

    def __init__(self, model: DecoderLM, autocast: torch.device | None, document_start: int | None) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast
        self.document_start = document_start

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor, count: Tensor | None = None) -> Tensor:
        with torch.autocast(self.autocast.type, torch.bfloat16) if self.autocast else contextlib.nullcontext():
            starts_BT = None if self.document_start is None else marked_starts(tokens_BT, self.document_start)
            return self.model.loss(tokens_BT, targets_BT, starts_BT, count)


@contextlib.contextmanager
def _without_axes(model: nn.Module, stage: int) -> Iterator[None]:
    """Lets DeepSpeed take over parameters without axes, which it cannot do by itself: it sends parameters from rank to
    rank as bytes, and torch views none that has no axis so. Stage 3 gets them with an axis and gives them back without;
    the others are told to send nothing, by the attribute of those that DeepSpeed is to leave alone."""
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
    """Model and optimizer over all ranks. Every method is called by every rank unless it says otherwise.

    `document_start`: the token that begins a document, where documents of one row are to be kept apart; else None.
    """

    def __init__(
        self, config: Config, model: DecoderLM, device: torch.device, document_start: int | None = None
    ) -> None:
        self.rank, self.world, self.device = dist.get_rank(), dist.get_world_size(), device
        self.stage = config.zero.stage
        self._lora = config.lora
        self._clipping = config.train.gradient_clipping if clips_itself(config) else None
        settings = deepspeed_config(config, self.world)
        # DeepSpeed allocates the bucket in which it sums gradients whole, however small the model is.
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        settings["zero_optimization"]["reduce_bucket_size"] = min(BUCKET, trained)
        self.accumulation: int = settings["gradient_accumulation_steps"]
        self.model = model.to(device)
        self.model_config = model.config
        model.activation_checkpointing = config.train.activation_checkpointing
        optimizer = build_optimizer(model, config.optim)
        autocast = device if config.precision == "bf16_autocast" else None
        module = LossModule(model, autocast, document_start)
        self._names = [name for name, _ in model.named_parameters()]
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

    def forward_backward(self, tokens_BT: Tensor, targets_BT: Tensor, targets: float) -> Tensor:
        """Adds the gradient of one micro batch of a global batch with `targets` targets in all.

        Returns its loss, detached: the mean of these losses over passes and ranks is the mean over all targets.
        """
        # DeepSpeed takes the mean over passes and ranks, however many targets each has: so each divides its sum by
        # what an equal share of the targets would be.
        share = torch.tensor(max(targets, 1.0) / (self.accumulation * self.world), device=self.device)
        loss: Tensor = self._engine(tokens_BT.to(self.device), targets_BT.to(self.device), share)
        self._engine.backward(loss)
        # DeepSpeed steps (reduces and updates) only at the boundary of accumulation; it counts the calls.
        boundary = self._engine.is_gradient_accumulation_boundary()
        if not boundary:
            self._engine.step()
        return loss.detach()

    def non_finite_gradients(self) -> list[str]:
        """Parameters that got a gradient with NaN or infinity on this rank since the last call."""
        return self._gradients.names()

    def step(self, factor: float, skip: bool = False) -> float:
        """The update, at `factor` times the peak learning rates; returns the norm of the gradient before clipping.

        With `skip` (the same on all ranks), and where the norm is not finite, nothing is updated, at any ZeRO stage;
        the norm that is returned is then not finite.
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
        if skip or not self._engine.was_step_applied():
            return math.nan
        return norm if self._clipping is not None else float(self._engine.get_global_grad_norm())

    def describe_skip(self, step: int, loss: float, names: list[str]) -> str:
        """What was not finite in a step, from what every rank found."""
        losses, found = zip(*gather((loss, names)), strict=True)
        return describe(step, list(losses), list(found))

    @torch.no_grad()
    def loss_sum(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Sum of the targets' losses in nats, without gradient."""
        one = torch.ones((), device=self.device)
        value: Tensor = self._engine(tokens_BT.to(self.device), targets_BT.to(self.device), one)
        return value

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Without dropout; after it every module is in the mode it was in."""
        modes = [(module, module.training) for module in self._engine.modules()]
        self._engine.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode

    # --- ranks --------------------------------------------------------------------------------------------------

    def sum(self, *values: float) -> list[float]:
        """Sums over ranks, in float64."""
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
        """Raises AgreedError that names the tensor and the rank when weights or optimizer state are not finite."""

        def look() -> None:
            name = first_non_finite(self._state())
            if name is not None:
                raise TrainingError(f"{name} is not finite: {consequence}")

        agree(look)

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        """Weights and optimizer state, as far as this rank holds them."""
        for name, parameter in self.model.named_parameters():
            yield name, getattr(parameter, "ds_tensor", parameter)  # at stage 3 the part of this rank
        for master, state in self.optimizer.state.items():
            yield "a float32 copy of weights", master
            yield from ((f"the optimizer's {key}", value) for key, value in state.items() if torch.is_tensor(value))

    # --- weights and checkpoints --------------------------------------------------------------------------------

    def full_state(self) -> dict[str, Tensor] | None:
        """All weights in float32 on the CPU (masters where the precision is lower) and saved buffers, on rank 0; None
        elsewhere."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        found: dict[str, Tensor] = {}
        first: dict[int, str] = {}
        masters = self._unfused_masters()
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if id(parameter) in first:  # shared by two names; only one is gathered
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
                found[name] = weight.detach().float().cpu().clone()
        saved = self.model.state_dict(keep_vars=True).keys()
        for name, buffer in self.model.named_buffers(remove_duplicate=False):
            if self.rank == 0 and name in saved:
                found[name] = buffer.to(buffer_dtype(buffer.dtype, torch.float32)).detach().cpu().clone()
        return found if self.rank == 0 else None

    def full_model(self) -> DecoderLM | None:
        """A copy of the model with all weights, on rank 0's CPU; None elsewhere."""
        state = self.full_state()
        if state is None:
            return None
        model = build_shapes(self.model_config)
        if self._lora.rank is not None:
            add_adapters(model, self._lora)
        if self.model_config.tie_embeddings:
            state["head.weight"] = state["embedding.weight"]
        model.load_state_dict(state, assign=True)
        if self.model_config.tie_embeddings:
            model.head.weight = model.embedding.weight
        fill_buffers(model, "cpu", torch.float32)
        return merge_adapters(model).eval() if self._lora.rank is not None else model.eval()

    def _forget_first_step(self) -> None:
        """Undoes a step that DeepSpeed takes, with gradients of zero, to have its states made.

        (In bf16 without ZeRO: moments would count one step too many, and the weights would decay once more.)
        """
        if self.stage == 0 and hasattr(self._engine.optimizer, "refresh_fp32_params"):
            self.optimizer.state.clear()
            self._engine.optimizer.refresh_fp32_params()

    def _unfused_masters(self) -> dict[int, Tensor]:
        """The float32 copies that DeepSpeed keeps of bf16 weights without ZeRO."""
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
        """Reads what `save` wrote at the same world size and ZeRO stage."""
        # A checkpoint brings the rates it was written with; the configuration of this run decides.
        options = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        # DeepSpeed takes the path for a pattern, so that none with [ ] in it would be found: it gets one without.
        with _quiet(), contextlib.chdir(path):
            found, _ = self._engine.load_checkpoint(".", tag=".")
        if found is None:
            raise ValueError(f"{path} holds no DeepSpeed checkpoint")
        for group, mine in zip(self.optimizer.param_groups, options, strict=True):
            group.update(mine)


@contextlib.contextmanager
def _quiet() -> Any:
    """Keeps DeepSpeed's progress reports off the user's screen; its warnings stay, but for one about our optimizer.

    (It warns of every optimizer that is not in its own list; the ZeRO tests compare the stages bit for bit.)
    """
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
