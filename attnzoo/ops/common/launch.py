"""One kernel launch as data: the same arguments are used to run on a GPU and to compile ahead of time."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
"""Triton's names of element types."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A kernel, its grid and its arguments by name, tuples among them; calling it runs the kernel.

    The properties below describe the launch to an ahead-of-time compiler; for that the tensors may be on the meta
    device. `name` tells cases apart in reports.
    """

    name: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    target: str = "any"
    """The only kind of GPU that the tiles are chosen for ("sm_80", "sm_90", "gfx942"), or "any"."""

    def __call__(self) -> None:
        # Fused multiply-adds are Triton's default up to 3.9 and not after it: say which.
        self.kernel[self.grid](
            **self.arguments, num_warps=self.num_warps, num_stages=self.num_stages, enable_fp_fusion=True
        )

    @property
    def constexprs(self) -> dict[Any, Any]:
        """Arguments fixed at compile time: constexpr parameters, by name; arguments that are None or 1 (Triton's rule),
        by path. A path is the index of an argument, then indices inside tuples."""
        fixed: dict[Any, Any] = {}
        for place, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            if parameter.is_constexpr:
                fixed[parameter.name] = value
            else:
                fixed |= {path: x for path, x in _leaves(value, (place,)) if _is_fixed(x)}
        return fixed

    @property
    def signature(self) -> dict[str, Any]:
        """Types of all arguments in the order of the kernel's parameters."""
        return {
            parameter.name: "constexpr" if parameter.is_constexpr else _type(self.arguments[parameter.name])
            for parameter in self.kernel.params
        }

    @property
    def aligned(self) -> set[tuple[int, ...]]:
        """Paths of arguments that Triton may assume to be multiples of 16: tensors, and integers that are."""
        return {
            path
            for place, parameter in enumerate(self.kernel.params)
            if not parameter.is_constexpr
            for path, value in _leaves(self.arguments[parameter.name], (place,))
            if isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0)
        }

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


def _leaves(value: Any, path: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Any]]:
    """(path, value) of every element inside of tuples, at any depth."""
    if isinstance(value, tuple):
        for i, inner in enumerate(value):
            yield from _leaves(inner, (*path, i))
    else:
        yield path, value


def _is_fixed(value: Any) -> bool:
    return value is None or (type(value) is int and value == 1)


def _type(value: Any) -> Any:
    if isinstance(value, tuple):
        types = [_type(inner) for inner in value]
        return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
    if _is_fixed(value):
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def check_inputs(operation: str, widest: int, **tensors: Tensor | None) -> None:
    """Raises ValueError for inputs that forward-only kernels do not support: other dtypes, wider rows, gradients."""
    given = {name: x for name, x in tensors.items() if x is not None}
    dtypes = {name: x.dtype for name, x in given.items()}
    if len(set(dtypes.values())) > 1 or not {*dtypes.values()} <= {torch.float32, torch.bfloat16, torch.float16}:
        found = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise ValueError(
            f"{operation} with impl='triton' takes one dtype of float32, bfloat16 and float16, not {found}; "
            "use impl='torch'"
        )
    for name, x in given.items():
        if not 1 <= x.shape[-1] <= widest:
            raise ValueError(
                f"{operation} with impl='triton' takes rows of 1 to {widest} channels, and {name} has {x.shape[-1]}; "
                "use impl='torch'"
            )
    if torch.is_grad_enabled() and any(x.requires_grad for x in given.values()):
        raise ValueError(f"{operation} has no gradients: call it under torch.no_grad(), or on detached tensors")
