"""What is not finite: found in the gradients of every rank in every step, and in what is about to be saved.

A gradient is looked at where autograd delivers it, before any rank or ZeRO stage has added or cut it, so the rank and
the tensor that a NaN began in have a name at every stage. The extra cost is one pass over each gradient.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def is_finite(tensor: Tensor) -> Tensor:
    """Whether all elements are finite, as a tensor of one bool (a GPU is not waited for); no copy is made."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    least, most = tensor.detach().aminmax()
    return torch.isfinite(least) & torch.isfinite(most)


def first_non_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or infinity."""
    return next((name for name, tensor in named if not bool(is_finite(tensor))), None)


def finite_or_none(value: float | None) -> float | None:
    """NaN and infinity, which JSON has no words for, as null."""
    return None if value is None or not math.isfinite(value) else value


class GradientCheck:
    """Watches the gradients that `module`'s parameters get on this rank."""

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
    """What was not finite in a step, from the mean loss and the parameters that each rank found."""
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
