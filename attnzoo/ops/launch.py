"""One kernel launch as data: what runs on a GPU is also what is compiled ahead of time, argument by argument."""

from dataclasses import dataclass
from typing import Any

import torch

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}
"""Triton's names of element types."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A kernel, its grid and its arguments by name; calling it runs the kernel.

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
    def constexprs(self) -> dict[str, Any]:
        """Arguments fixed at compile time: those annotated so, those left out (None), and 1 (Triton's rule)."""
        fixed = {parameter.name for parameter in self.kernel.params if parameter.is_constexpr}
        return {
            name: value
            for name, value in self.arguments.items()
            if name in fixed or value is None or (type(value) is int and value == 1)
        }

    @property
    def signature(self) -> dict[str, str]:
        """Types of all arguments in the order of the kernel's parameters."""
        fixed = self.constexprs
        return {name: "constexpr" if name in fixed else _type(self.arguments[name]) for name in self.kernel.arg_names}

    @property
    def aligned(self) -> set[str]:
        """Arguments for which Triton may count on a multiple of 16: tensors, and integers that are one."""
        return {
            name
            for name, value in self.arguments.items()
            if isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0)
        } - self.constexprs.keys()

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"
