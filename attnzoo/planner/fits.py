"""Memory of training a model on one rank, by part, for each ZeRO stage of DeepSpeed 0.19 as `train.engine` uses it.

The formulas follow the allocator's records of real runs on 1 and 2 ranks; tests compare them with some of these.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from attnzoo.derived_memory import PassMemory
from attnzoo.models import DecoderLM

Precision = Literal["fp32", "bf16"]
GIB = 2**30
BUCKET = 500_000_000
"""Elements in the gradient buffer of ZeRO 1 to 3 (DeepSpeed's default reduce_bucket_size). It is allocated whole; for a
smaller model it has the model's size (`train.engine`)."""
LIVE = 1_000_000_000
"""Parameters that ZeRO 3 keeps gathered at once (DeepSpeed's default stage3_max_live_parameters)."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a model is trained. stage: of ZeRO. ranks: over which ZeRO partitions. tokens: of one sequence.
    checkpointing: of activations. accumulate: a step has several passes, so that gradients and activations exist at the
    same time. gpu: AdamW updates all tensors at once."""

    stage: int = 0
    ranks: int = 1
    micro_batch: int = 1
    tokens: int = 1
    precision: Precision = "fp32"
    optimizer: Literal["adamw", "muon"] = "adamw"
    checkpointing: bool = False
    accumulate: bool = True
    gpu: bool = True

    @property
    def width(self) -> int:
        """Bytes of a weight, an activation and a gradient."""
        return 4 if self.precision == "fp32" else 2


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes that one rank holds at its peak. master: float32 copies of the weights that this rank updates.

    workspace: temporaries of the forward and backward pass (mostly logits and their gradients), or those of the
    optimizer's step if they are larger.
    """

    parameters: int
    master: int
    gradients: int
    optimizer: int
    buckets: int
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def training_memory(model: DecoderLM, setup: Setup) -> TrainingMemory:
    """The peak memory of training `model`, which may be on the meta device."""
    count, cut, width = model.num_parameters(), setup.ranks if setup.stage else 1, setup.width
    whole = setup.stage < 3
    gathered = width * min(count, LIVE) if not whole and cut > 1 else 0
    passes = activation_memory(model, setup)
    kept, workspace = passes.kept, passes.workspace
    gradients, step = gradient_bytes(setup, count), step_bytes(model, setup)
    held = gradients if setup.accumulate or setup.stage == 3 else 0
    if held + kept + workspace < gradients + step:  # the optimizer's step needs more
        kept, workspace, held = 0, step, gradients
    bucket = width * min(BUCKET, count)
    return TrainingMemory(
        parameters=width * count // (1 if whole else cut) + gathered,
        master=4 * count // cut if setup.stage or width == 2 else 0,
        gradients=held,
        optimizer=optimizer_bytes(model, setup.optimizer) // cut,
        buckets=bucket if setup.stage else 0,
        activations=kept,
        workspace=workspace,
    )


def activation_memory(model: DecoderLM, setup: Setup) -> PassMemory:
    """What forward and backward hold, derived once for all ZeRO stages, and read off a straight line where there is one
    in the micro-batch: from some number on, sequences are computed one after the other."""
    shape = json.dumps(model.config.to_dict(), sort_keys=True)
    known = _KNOWN.setdefault((shape, setup.tokens, setup.width, setup.checkpointing), {})
    found = known.get(setup.micro_batch) or on_a_line(known, setup.micro_batch)
    if found is None:
        model.activation_checkpointing, before = setup.checkpointing, model.activation_checkpointing
        dtype = torch.float32 if setup.width == 4 else torch.bfloat16
        found = known[setup.micro_batch] = model.training_memory(setup.micro_batch, setup.tokens, dtype)
        model.activation_checkpointing = before
    return found


_KNOWN: dict[tuple[str, int, int, bool], dict[int, PassMemory]] = {}
"""By configuration, tokens, bytes of a number and checkpointing: memory by the number of sequences."""


def on_a_line(known: Mapping[int, PassMemory], count: int) -> PassMemory | None:
    """The memory at `count` where it lies between known ones, and three of them on a straight line; else None."""
    below, above = sorted(n for n in known if n < count)[-2:], sorted(n for n in known if n > count)[:2]
    for counts in (below + above[:1], below[-1:] + above):
        if len(counts) < 3:
            continue
        first, middle, last = counts
        start, between, end = (vars(known[n]) for n in counts)
        if all(
            (between[name] - start[name]) * (last - first) == (end[name] - start[name]) * (middle - first)
            for name in start
        ):
            return PassMemory(
                **{name: start[name] + (end[name] - start[name]) * (count - first) // (last - first) for name in start}
            )
    return None


def gradient_bytes(setup: Setup, count: int) -> int:
    """Bytes of gradients that one rank holds between two passes; ZeRO partitions them from stage 2 on."""
    return count * setup.width // (setup.ranks if setup.stage >= 2 else 1)


def step_bytes(model: DecoderLM, setup: Setup) -> int:
    """Bytes of temporaries in the optimizer's step. In bf16: float32 copies of the gradients, with ZeRO bf16 weights
    too. With ZeRO or on a GPU: one float32 tensor of all updated weights. Muon with ZeRO: whole matrices, gathered and
    stacked."""
    count, cut = model.num_parameters(), setup.ranks if setup.stage else 1
    copied = (6 if setup.stage else 4) * count // cut if setup.width == 2 else 0
    if setup.optimizer == "muon" and cut > 1:
        return copied + 2 * 4 * matrix_count(model)
    return copied + (4 * count // cut if setup.stage or setup.gpu else 0)


def matrix_count(model: DecoderLM) -> int:
    """Number of weights in the matrices that Muon updates."""
    return sum(parameter.numel() for _, parameter in model.matrix_parameters())


def optimizer_bytes(model: DecoderLM, optimizer: str) -> int:
    """Bytes of optimizer state on all ranks together: two float32 moments for AdamW, one for Muon's matrices."""
    return 8 * model.num_parameters() - (4 * matrix_count(model) if optimizer == "muon" else 0)


def communicated_bytes(model: DecoderLM, setup: Setup, passes: int = 1) -> int:
    """Bytes that one rank sends in a step with ring collectives; it receives as many.

    For P weights of w bytes and n ranks: stages 0 to 2 reduce gradients and gather weights once a step, 2 w P (n-1)/n;
    stage 3 gathers weights for the forward and the backward pass and scatters gradients, 3 w P (n-1)/n for each of
    `passes` (Rajbhandari et al. 2020, arXiv 1910.02054, section 7).
    """
    once = setup.width * model.num_parameters() * (setup.ranks - 1) // setup.ranks
    return once * (3 * passes if setup.stage == 3 else 2)
