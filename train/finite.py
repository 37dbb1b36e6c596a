"""Finds NaN and infinity in gradients in every step, and in tensors that are to be saved.

A gradient is checked where autograd delivers it, before it is summed over ranks or partitioned by ZeRO. So messages can
name the rank and the tensor in which a NaN arose. The cost is one pass over each gradient.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def is_finite(tensor: Tensor) -> Tensor:
    """Whether all elements are finite, as a 0-dimensional bool tensor (so that a GPU is not waited for)."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    least, most = tensor.detach().aminmax()
    return torch.isfinite(least) & torch.isfinite(most)


def first_non_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor with NaN or infinity; None if there is none."""
    return next((name for name, tensor in named if not bool(is_finite(tensor))), None)


def finite_or_none(value: float | None) -> float | None:
    """The value, or None for NaN and infinity, which JSON cannot express."""
    return None if value is None or not math.isfinite(value) else value


class GradientCheck:
    """Checks the gradients of a module's parameters on this rank."""

    def __init__(self, module: nn.Module) -> None:
        self._found: dict[str, Tensor] = {}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._watch(name))

    def _watch(self, name: str) -> "_Hook":
        return _Hook(self._found, name)

    def names(self) -> list[str]:
        """Parameters whose gradient was not finite since the last call."""
        if not self._found:
            return []
        finite = torch.stack(list(self._found.values())).tolist()
        names = [name for name, fine in zip(self._found, finite, strict=True) if not fine]
        self._found.clear()
        return names


class _Hook:
    def __init__(self, found: dict[str, Tensor], name: str) -> None:
        self.found, self.name = found, name

    def __call__(self, gradient: Tensor) -> None:
        fine, before = is_finite(gradient), self.found.get(self.name)
        self.found[self.name] = fine if before is None else fine & before


def describe(step: int, losses: list[float], names: list[list[str]]) -> str:
    """A message about a step that was not finite. losses: mean loss of each rank. names: for each rank, the parameters
    whose gradients were not finite."""
    parts = []
    for rank, (loss, found) in enumerate(zip(losses, names, strict=True)):
        if not math.isfinite(loss):
            parts.append(f"the loss of rank {rank} is {loss}")
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            parts.append(f"the gradient of {found[0]}{more} on rank {rank} is not finite")
    return f"step {step}: " + (
        "; ".join(parts) or "the norm of the gradient, summed over the ranks, is not finite though each part is"
    )
