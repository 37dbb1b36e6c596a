"""Backward passes that have no derivative of their own."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


class _NoSecondDerivative(torch.autograd.Function):
    """Returns the first `count` tensors. What depends on the others cannot be differentiated through it."""

    @staticmethod
    def forward(ctx: Any, operation: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.operation = operation
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            f"{ctx.operation} has no second derivative; a layer's `reference`, in plain sums, has all of them"
        )


def first_order(operation: str) -> Callable[[Backward], Backward]:
    """Decorates the `backward` of an autograd function that gives numbers without a graph, so that a second derivative
    is an error. torch's `once_differentiable` gives an error in `backward()` alone: `torch.autograd.grad` leaves the
    operation out of its sum without a word. operation: the name in the error message.
    """

    def decorate(backward: Backward) -> Backward:
        @wraps(backward)
        def run(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
            with torch.no_grad():
                found = backward(ctx, *gradients)
            if not torch.is_grad_enabled():
                return found
            tensors = [each for each in found if each is not None]
            given = [each for each in (*gradients, *ctx.saved_tensors) if each is not None and each.requires_grad]
            guarded = iter(_NoSecondDerivative.apply(operation, len(tensors), *tensors, *given))
            return tuple(None if each is None else next(guarded) for each in found)

        return run

    return decorate
