"""Memory of training a model on one rank, by part, for every ZeRO stage of DeepSpeed 0.19 as `train.engine` runs it.

What each stage keeps was read from the allocator's records of real runs on 1 and 2 ranks; tests hold some of them here.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from attnzoo.models import DecoderLM

Precision = Literal["fp32", "bf16"]
GIB = 2**30
BUCKET = 500_000_000
"""Elements of the buffer in which ZeRO 1 to 3 collect gradients (DeepSpeed's default reduce_bucket_size), allocated
whole; smaller models get one of their own size (`train.engine`)."""
LIVE = 1_000_000_000
"""Parameters that ZeRO 3 keeps gathered at once (DeepSpeed's default stage3_max_live_parameters)."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a model is trained. ranks: over which ZeRO cuts; accumulate: whether a step takes more than one pass, so that
    gradients exist beside activations; gpu: AdamW steps all tensors at once."""

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
    """Bytes of one rank at the moment it holds most. master: float32 copies of the weights this rank updates.

    workspace: what forward and backward hold at once beyond the activations kept, logits and their gradients most of
    all; or, where that is more, what the optimizer's step holds.
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
    """The parts; `model` may live on the meta device."""
    count, cut, width = model.num_parameters(), setup.ranks if setup.stage else 1, setup.width
    whole = setup.stage < 3
    gathered = width * min(count, LIVE) if not whole and cut > 1 else 0
    model.activation_checkpointing, before = setup.checkpointing, model.activation_checkpointing
    dtype = torch.float32 if width == 4 else torch.bfloat16
    kept, workspace = model.training_memory(setup.micro_batch, setup.tokens, dtype)
    model.activation_checkpointing = before
    gradients, step = gradient_bytes(setup, count), step_bytes(model, setup)
    held = gradients if setup.accumulate or setup.stage == 3 else 0
    if held + kept + workspace < gradients + step:  # the step takes more than the passes do
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


def gradient_bytes(setup: Setup, count: int) -> int:
    """Bytes of gradients between two passes: whole at stages 0 and 1, cut above."""
    return count * setup.width // (setup.ranks if setup.stage >= 2 else 1)


def step_bytes(model: DecoderLM, setup: Setup) -> int:
    """Bytes that the optimizer's step holds: gradients of half precision once more in float32; with ZeRO narrowed
    weights and one more flat tensor; on a GPU a temporary for all tensors at once; Muon's whole matrices, gathered and
    stacked."""
    count, cut = model.num_parameters(), setup.ranks if setup.stage else 1
    copied = (6 if setup.stage else 4) * count // cut if setup.width == 2 else 0
    if setup.optimizer == "muon" and cut > 1:
        return copied + 2 * 4 * matrix_count(model)
    return copied + (4 * count // cut if setup.stage or setup.gpu else 0)


def matrix_count(model: DecoderLM) -> int:
    """Number of weights that Muon takes."""
    return sum(parameter.numel() for _, parameter in model.matrix_parameters())


def optimizer_bytes(model: DecoderLM, optimizer: str) -> int:
    """Bytes of optimizer state of all ranks together: two float32 moments for AdamW, one for Muon's matrices."""
    return 8 * model.num_parameters() - (4 * matrix_count(model) if optimizer == "muon" else 0)


def communicated_bytes(model: DecoderLM, setup: Setup, passes: int = 1) -> int:
    """Bytes that one rank sends in a step (as many as it receives), rings assumed.

    Stages 0 to 2 reduce gradients and gather weights once a step, 2 w P (n-1)/n; stage 3 gathers weights for the
    forward and the backward of every pass and scatters gradients, 3 w P (n-1)/n a pass (Rajbhandari et al. 2020,
    arXiv 1910.02054, section 7).
    """
    once = setup.width * model.num_parameters() * (setup.ranks - 1) // setup.ranks
    return once * (3 * passes if setup.stage == 3 else 2)
