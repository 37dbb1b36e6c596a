"""Chooses an operation's implementation: explicitly, never by a silent fallback."""

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from attnzoo.errors import suggest

Impl = Literal["auto", "reference", "torch", "triton"]


def choose(operation: str, impl: Impl, known: Mapping[str, Callable[..., Any]], like: Tensor) -> Callable[..., Any]:
    """The implementation named `impl` for tensors like `like`.

    "auto" is "triton" on a GPU where it is installed, and "torch" elsewhere and for float64 (kernels sum in float32).

    Raises ValueError for a name this operation does not have, and for "triton" where it cannot run.
    """
    if impl == "auto":
        wanted = like.device.type == "cuda" and like.dtype != torch.float64
        impl = "triton" if wanted and "triton" in known and _has_triton() else "torch"
    if impl not in known:
        raise ValueError(f"{operation} has no implementation {impl!r}{suggest(impl, [*known, 'auto'])}")
    if impl == "triton":
        _check_triton(operation, like.device)
    return known[impl]


def lazily(module: str, function: str) -> Callable[..., Any]:
    """`function` of `module`, imported at the first call: importing attnzoo does not import triton."""

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*args)

    return call


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _check_triton(operation: str, device: torch.device) -> None:
    if not _has_triton():
        raise ValueError(f"{operation} with impl='triton': the package triton is not installed; pip install triton")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"{operation} with impl='triton' on a CPU: use impl='torch' or 'auto', or set TRITON_INTERPRET=1 before "
            "the start of Python to run the kernel, slowly, in Triton's interpreter"
        )
