"""Layers of any attention variant on in-context tokens, and measurements of a trained model."""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention import ATTENTION, build_attention
from attnzoo.incontext import Tasks

INNER_DIM, HEADS = 32, 2


class VariantLayers(nn.Module):
    """`depth` layers e <- e + write(attention(read(e))) on tokens of `width` = D + 1. looped: all layers share weights.

    read and write are linear maps between tokens and the variant's model_dim, so that a layer can be applied to its own
    output. inner_dim: the model_dim; None: the variant works on the tokens directly. std: of the initial weights.
    """

    def __init__(
        self,
        kind: str,
        options: dict[str, Any],
        width: int,
        depth: int,
        *,
        looped: bool,
        inner_dim: int | None = INNER_DIM,
        std: float = 0.2,
    ) -> None:
        super().__init__()
        self.depth = depth
        self.layers = nn.ModuleList(_Layer(kind, options, width, inner_dim, std) for _ in range(1 if looped else depth))

    def forward(self, tasks: Tasks, depth: int | None = None, damping: float = 1.0) -> Tensor:
        """Predictions [B]; see `GramAttention.forward`."""
        e_BTE = tasks.tokens()
        for index in range(self.depth if depth is None else depth):
            e_BTE = e_BTE + damping * self.layers[min(index, len(self.layers) - 1)](e_BTE)
        return -e_BTE[:, -1, -1]


class _Layer(nn.Module):
    def __init__(self, kind: str, options: dict[str, Any], width: int, inner_dim: int | None, std: float) -> None:
        super().__init__()
        dim = width if inner_dim is None else inner_dim
        fields = {field.name for field in dataclasses.fields(ATTENTION.get(kind).Config)}
        heads = {"num_heads": HEADS} if "num_heads" in fields and inner_dim is not None else {}
        self.attention = build_attention(kind, {"model_dim": dim} | heads | options, kind)
        self.attention.reset_parameters(std, std)
        self.read = nn.Identity() if inner_dim is None else nn.Linear(width, dim, bias=False)
        self.write = nn.Identity() if inner_dim is None else nn.Linear(dim, width, bias=False)

    def forward(self, e_BTE: Tensor) -> Tensor:
        out: Tensor = self.write(self.attention(self.read(e_BTE)))
        return out


def sensitivity(model: nn.Module, tasks: Tasks) -> Tensor:
    """d yhat / d x_q of each task, [B, D]."""
    query_BD = tasks.query_BD.clone().requires_grad_()
    prediction_B = model(dataclasses.replace(tasks, query_BD=query_BD))
    return torch.autograd.grad(prediction_B.sum(), query_BD)[0]


def mean_cosine(a_BD: Tensor, b_BD: Tensor) -> float:
    """Mean over tasks of the cosine of two vectors."""
    return F.cosine_similarity(a_BD.double(), b_BD.double(), dim=-1).mean().item()


def thinned(losses: list[float], points: int = 120) -> list[list[float]]:
    """A training curve for figures: [step, mean loss] of about `points` intervals."""
    length = max(1, len(losses) // points)
    return [
        [start + length / 2, sum(losses[start : start + length]) / len(losses[start : start + length])]
        for start in range(0, len(losses), length)
    ]
