"""Memory of a forward and a backward pass, derived from one run of the code itself, without values.

The run computes on torch's fake tensors, which have shapes, dtypes and lifetimes but no numbers. Python, autograd and
its engine do what they always do, so tensors are made, saved and released in the true order; a dispatch mode adds up
their storages. Tests hold the sums against the allocator's records: they are equal to the byte where operators allocate
nothing but their results, and `SCRATCH` says what torch's fused attention holds besides.

Python code of custom operators (`torch.library.custom_op`) and of autograd functions runs too. Long loops over equal
blocks may say so (`representative`). Where a program asks for a value it is told zero: a branch on values is followed
as for a tensor of zeros.
"""

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attnzoo.types import accumulation_dtype

T = TypeVar("T")
aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class PassMemory:
    """Bytes that a part of a model takes in training, beyond its parameters, their gradients and its input.

    kept: what the forward pass leaves for the backward pass, its output included. forward, backward: the most that
    either pass holds at once, the kept bytes and the gradients of activations and of parameters included.
    """

    kept: int
    forward: int
    backward: int

    @property
    def peak(self) -> int:
        """The most that is held at once."""
        return max(self.forward, self.backward)

    @property
    def workspace(self) -> int:
        """The most that is held at once beyond what is kept."""
        return self.peak - self.kept


def in_sequence(parts: Iterable[PassMemory]) -> PassMemory:
    """Parts that run one after the other, and backwards in the opposite order."""
    kept = forward = backward = 0
    for part in parts:
        forward, backward = max(forward, kept + part.forward), max(backward, kept + part.backward)
        kept += part.kept
    return PassMemory(kept=kept, forward=forward, backward=backward)


def extrapolated(derive: Callable[[int], PassMemory], tokens: int, step: int) -> PassMemory:
    """Memory at `tokens` of what runs block by block, from a straight line through few of them. `step`: tokens from
    which on a block more only adds to what is held, a multiple of every block's length."""
    rest = tokens % step
    low, high = 2 * step + rest, 3 * step + rest
    if tokens <= high:
        return derive(tokens)
    at_low, at_high = derive(low), derive(high)

    def line(name: str) -> int:
        slope: int = getattr(at_high, name) - getattr(at_low, name)
        known: int = getattr(at_high, name)
        return known + slope * (tokens - high) // (high - low)

    return PassMemory(kept=line("kept"), forward=line("forward"), backward=line("backward"))


def pass_memory(
    module: nn.Module,
    *inputs: Tensor,
    run: Callable[..., Tensor] | None = None,
    dtype: torch.dtype | None = None,
    inner: bool = False,
) -> PassMemory:
    """What `run(module, *inputs)` (None: `module(*inputs)`) and its backward pass take on a CPU.

    Inputs are tensors of any device, whose values are not read; floating point ones get gradients. `dtype`: of the
    module's numbers, None: as they are. `inner`: the module stands between others, so that its input and output are
    released as soon as nothing needs them, and the output's gradient is counted until it has been used; else the caller
    holds all three, and they are counted but for the output. Raises ValueError where the code needs values.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        given = [torch.empty(x.shape, dtype=x.dtype, requires_grad=x.is_floating_point()) for x in inputs]
        known = _numbers(module, dtype)
    module = copy.deepcopy(module, dict(known))
    outside = [*given, *known.values(), *(x.grad for x in known.values() if x.grad is not None)]
    try:
        with mode, _running(_Level(outside)) as level:
            passes = _inner_passes if inner else _passes
            return passes(level, module if run is None else partial(run, module), given)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"the memory of {type(module).__name__} cannot be derived, because its code needs the values of tensors "
            f"({reason}); write its memory_by_hand"
        ) from error


def _numbers(module: nn.Module, dtype: torch.dtype | None) -> dict[int, Tensor]:
    """Parameters (with gradients) and buffers without values, by the identity of the true ones."""
    found: dict[int, Tensor] = {}
    for x in (*module.parameters(), *module.buffers()):
        new = torch.empty(x.shape, dtype=dtype if dtype is not None and x.is_floating_point() else x.dtype)
        if isinstance(x, nn.Parameter):
            new = nn.Parameter(new, requires_grad=x.requires_grad)
            new.grad = torch.empty_like(new) if x.requires_grad else None
        found[id(x)] = new
    return found


def _passes(level: "_Level", call: Callable[..., Tensor], given: list[Tensor]) -> PassMemory:
    out = call(*given)
    kept, forward, level.peak = level.held, level.peak, 0
    with level.uncounted():
        gradient = torch.empty_like(out)
    out.backward(gradient)
    return PassMemory(kept=kept, forward=forward, backward=level.peak)


def _inner_passes(level: "_Level", call: Callable[..., Tensor], given: list[Tensor]) -> PassMemory:
    """Inputs are made and released here, since they stay as long as the code keeps them, but count for another part."""
    given[:] = [_Begin.apply(x) if x.requires_grad else x for x in given]
    before, level.peak = level.held, level.held
    out = call(*given)
    given.clear()
    kept, forward, level.peak = level.held - before, level.peak - before, 0
    end = _End.apply(out)
    del out
    end.backward()
    return PassMemory(kept=kept, forward=forward, backward=level.peak - before)


class _Begin(torch.autograd.Function):
    """Stands for what comes before: makes the input, and releases its gradient."""

    @staticmethod
    def forward(ctx: Any, like: Tensor) -> Tensor:
        return torch.empty_like(like)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        return None


class _End(torch.autograd.Function):
    """Stands for what follows: keeps nothing, and makes the gradient of the output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return x.new_empty(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.empty(ctx.shape, dtype=ctx.dtype)


def stand_in(memory: PassMemory, x: Tensor, *_: Any, **__: Any) -> Tensor:
    """Something of x's shape that keeps x, and holds as much as `memory` says in a forward and a backward pass."""
    out: Tensor = _StandIn.apply(x, memory)
    return out


class _StandIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, memory: PassMemory) -> Tensor:
        torch.empty(memory.forward, dtype=torch.uint8)
        ctx.save_for_backward(x, torch.empty(max(memory.kept - x.nbytes, 0), dtype=torch.uint8))
        ctx.rest = memory.backward - memory.kept
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        torch.empty(max(ctx.rest, 0), dtype=torch.uint8)
        return torch.empty_like(gradients[0]), None


_RUNNING: ContextVar["_Level | None"] = ContextVar("running", default=None)


@contextmanager
def _running(level: "_Level") -> Iterator["_Level"]:
    token = _RUNNING.set(level)
    try:
        with level:
            yield level
    finally:
        _RUNNING.reset(token)


def without_values() -> bool:
    """Whether this code runs for its memory alone. What it makes must not be remembered beyond the call."""
    return _RUNNING.get() is not None


def representative(rounds: Iterable[T], largest: Literal["first", "last"] = "first") -> Iterable[T]:
    """A loop whose rounds leave nothing behind and hold equally much, or less and less, or (largest="last") more and
    more: all rounds; for the memory alone the two that hold most, since one may hold what the other left."""
    if not without_values():
        return rounds
    every = list(rounds)
    return every[:2] if largest == "first" else every[-2:]


def shared(make: Callable[[], T]) -> T:
    """A constant that all calls share: where only memory counts it is made without being counted."""
    level = _RUNNING.get()
    if level is None:
        return make()
    with level.uncounted():
        return make()


class _Level(TorchDispatchMode):
    """Adds up the storages that are made while it is on: `held` now, and `peak` since it was last set to 0."""

    def __init__(self, outside: Sequence[Tensor]) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.storages: dict[int, ref[Any]] = {}
        self.inside: dict[Any, Callable[..., Any] | None] = {}
        self.counts = True
        with self.uncounted():
            self._add(outside)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # its wrapper would stand between the engine and `__torch_dispatch__`

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Storages that are made inside are somebody else's."""
        before, self.counts = self.counts, False
        try:
            yield
        finally:
            self.counts = before

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return 0.0 if args[0].is_floating_point() else 0
        inside = self._made_of(func)
        if inside is not None:
            with self:
                return inside(*args, **kwargs)
        out = func(*args, **kwargs)
        self._add(out)
        # The engine sums gradients in place where nobody else holds the first one, but never under a mode: what the sum
        # takes counts from the next operator on, when the first one is gone.
        if func is not aten.add.Tensor or sys._getframe(1).f_code.co_name != "_engine_run_backward":
            scratch = SCRATCH.get(func)
            self.peak = max(self.peak, self.held + (0 if scratch is None else scratch(*args, **kwargs)))
        return out

    def _made_of(self, func: Any) -> Callable[..., Any] | None:
        """The operators that an operator calls, if it is made of others: Python code, or a composition of torch's."""
        if func not in self.inside:
            custom = OPDEFS.get(func._schema.name)
            if custom is not None:
                self.inside[func] = custom._init_fn
            else:
                composed = func.namespace == "aten" and func._can_decompose() and not _has_kernel(func)
                self.inside[func] = func.decompose if composed else None
        return self.inside[func]

    def _add(self, made: Any) -> None:
        for x in tree_leaves(made):
            if not isinstance(x, Tensor):
                continue
            storage = x.untyped_storage()
            key, size = storage._cdata, storage.nbytes() if self.counts else 0
            if key not in self.storages:
                self.storages[key] = ref(storage, partial(self._remove, key, size))
                self.held += size

    def _remove(self, key: int, size: int, _: Any) -> None:
        del self.storages[key]
        self.held -= size


def _has_kernel(func: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), torch._C.DispatchKey.CPU))


def _threads_tiles(queries: int, keys: int) -> tuple[int, int]:
    """Rows of queries and keys of a tile of torch's fused attention on a CPU, times the threads
    (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp, torch 2.13): each keeps tiles in the dtype of sums."""
    rows = min(queries, 256 if queries >= 768 else 64 if queries >= 192 else 32)
    return torch.get_num_threads() * rows, min(512, keys)


def _flash_forward(q_BNTH: Tensor, k_BNSH: Tensor, *_: Any, **__: Any) -> int:
    """Scores, their maxima and sums, outputs."""
    rows, keys = _threads_tiles(q_BNTH.shape[2], k_BNSH.shape[2])
    return rows * (keys + 2 + q_BNTH.shape[3]) * accumulation_dtype(q_BNTH.dtype).itemsize


def _flash_backward(gradient: Tensor, q_BNTH: Tensor, k_BNSH: Tensor, *_: Any, **__: Any) -> int:
    """Scores and their gradients, and one sum a query."""
    rows, keys = _threads_tiles(q_BNTH.shape[2], k_BNSH.shape[2])
    return (2 * rows * keys + q_BNTH.shape[:3].numel()) * accumulation_dtype(q_BNTH.dtype).itemsize


SCRATCH: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: _flash_forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _flash_backward,
}
"""Bytes that operators hold while they run, beyond inputs and results, by their arguments: for those that are not made
of others. An operator of compiled code that needs much may be entered."""
