"""What `compiled` uses of torch's compiler beside its public interface, and nothing else: it may move with a release of
torch. tests/unit/test_torch_compiler.py fails then, and says what has moved."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def without_guards(function: F) -> F:
    """A function, compiled whole, without torch's guards: checking them costs as much as all operations besides the
    products. Nothing then checks that later inputs are of the kind of the first, but for sizes that `vary`."""
    # Reordering would read a cache after it is written, which costs a copy of it.
    options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe, "reorder_for_locality": False}
    return cast(F, torch.compile(function, fullgraph=True, options=options))


def vary(tensor: Tensor, axis: int, expected: int) -> None:
    """Tells the compiler that a size of this tensor will vary, and which size to expect."""
    torch._dynamo.mark_dynamic(tensor, axis, hint_override=expected)


def has_compiler() -> bool:
    """Whether there is a C++ compiler for code that runs on a CPU."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True
