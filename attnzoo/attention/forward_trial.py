"""A plain module's forward is tried on a short sequence before it is used: what cannot be continued is refused.

It runs in the dtype of its weights, and once more in float64, where differences that rounding would explain are none:
a leak of a hundred-thousandth is found.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

PREFIXES = (1, 4, 20)
PROBE = 37
"""A forward is run on a sequence of PROBE tokens and on its PREFIXES, whose outputs have to be the same."""
CLOSED = 1e-2
"""A parameter without a larger number is a gate that is not open yet."""
EXACTLY = 1e-5
"""How much outputs may change in float64, for the largest of them; parts of a forward may compute in float32."""
MOST_EXACT = 1 << 24
"""Numbers of a module that is tried in float64, which takes a copy of it: 128 MiB."""


class ForwardFailedError(ValueError):
    """A forward raised an error of its own."""


Run = Callable[[Callable[..., Any], Tensor, Tensor | None], Tensor]
"""What calls a forward with x and a context, and checks the shape of what it returns."""


@dataclass(frozen=True)
class Trial:
    """One way to run a forward. name: of its class; call: the module itself; allowed: how much its outputs may change,
    for the largest of them; None: what the rounding of their dtype explains."""

    name: str
    run: Run
    call: Callable[..., Any]
    allowed: float | None = None

    def outputs(self, x_BTD: Tensor, context_BSD: Tensor | None = None) -> Tensor:
        """Raises ForwardFailedError for an error of the forward itself, ValueError for outputs of another shape."""

        def call(*given: Any, **others: Any) -> Any:
            try:
                return self.call(*given, **others)
            except Exception as error:  # whatever a user's module raises is told with its name and its input
                reason = str(error).partition("\n")[0]
                raise ForwardFailedError(
                    f"{self.name}.forward fails on x of {list(x_BTD.shape)}: {type(error).__name__}: {reason}; "
                    "it has to take any number of tokens from 1 on"
                ) from error

        return self.run(call, x_BTD, context_BSD)

    def check_alone(self, x_BTD: Tensor) -> None:
        """Raises ValueError for a forward whose outputs are random, or change with the sequences beside."""
        given = x_BTD.clone()
        whole = self.outputs(x_BTD)
        if not torch.equal(x_BTD, given):
            raise ValueError(
                f"{self.name}.forward writes to its input; work on a copy of it (x = x + y, and not x += y)"
            )
        if not bool(whole.isfinite().all()):
            raise ValueError(f"{self.name}.forward returns numbers that are not finite, for inputs of size 1")
        again = float((whole - self.outputs(x_BTD)).abs().max())
        if again > self._most(whole):
            raise ValueError(
                f"{self.name}.forward is random in evaluation mode: called twice on one input its outputs differ by "
                f"{again:.2g}; draw random numbers in training mode alone (self.training)"
            )
        alone = torch.cat([self.outputs(x_1TD) for x_1TD in x_BTD.split(1)])
        beside = float((whole - alone).abs().max())
        if beside > self._most(whole):
            raise ValueError(
                f"{self.name}.forward mixes sequences: outputs of one change by {beside:.2g} with another in the "
                "batch. x is [batch, tokens, model_dim]: is batch_first=True missing?"
            )

    def check_prefixes(self, x_BTD: Tensor, context_BSD: Tensor | None = None) -> None:
        """Raises ValueError for a forward whose outputs change with later tokens."""
        whole = self.outputs(x_BTD, context_BSD)
        for tokens in PREFIXES:
            change = float((whole[:, :tokens] - self.outputs(x_BTD[:, :tokens], context_BSD)).abs().max())
            if change > self._most(whole):
                raise ValueError(
                    f"{self.name}.forward sees the future: with {PROBE - tokens} tokens more, its outputs for the "
                    f"first {tokens} change by {change:.2g}. Hide later tokens from earlier ones (for example "
                    "torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)), or write `causal = "
                    f"False` into {self.name}: then it has no streaming form, and no language model takes it"
                )

    def _most(self, whole: Tensor) -> float:
        share = 2 * torch.finfo(whole.dtype).eps ** 0.5 if self.allowed is None else self.allowed
        return share * float(whole.abs().max())

    def computes_in(self, x_BTD: Tensor) -> bool:
        """Whether it takes inputs of this dtype and returns outputs in it."""
        try:
            return self.outputs(x_BTD).dtype == x_BTD.dtype
        except ValueError:
            return False


def try_out(
    name: str, module: nn.Module, run: Run, check: Callable[[Trial, Tensor, Tensor], None], x_BTD: Tensor
) -> None:
    """`check(trial, x, context)` in the dtype of x, and again in float64 where the module computes in it."""
    generator = torch.Generator().manual_seed(0)
    x_BTD, context_BSD = torch.randn(2, *x_BTD.shape, generator=generator).to(x_BTD.device, x_BTD.dtype)
    with _probing(module) as call:
        check(Trial(name, run, call), x_BTD, context_BSD)
    if x_BTD.dtype == torch.float64 or sum(x.numel() for x in module.parameters()) > MOST_EXACT:
        return
    x_BTD, context_BSD = x_BTD.double(), context_BSD.double()
    with _probing(module, exact) as call:
        trial = Trial(name, run, call, EXACTLY)
        if trial.computes_in(x_BTD):
            check(trial, x_BTD, context_BSD)


def exact(x: Tensor) -> Tensor:
    """In float64, if it holds real numbers."""
    return x.double() if x.is_floating_point() else x


def with_tensors(module: nn.Module, tensors: dict[str, Tensor], x: Tensor, **others: Any) -> Any:
    """`module(x, ...)` with other parameters and buffers."""
    return functional_call(module, tensors, (x,), others)


@contextmanager
def _probing(module: nn.Module, convert: Callable[[Tensor], Tensor] = lambda x: x) -> Iterator[Callable[..., Any]]:
    """A way to run a module that leaves no trace: in its evaluation mode, on copies of its buffers, with random numbers
    that nobody else misses. convert: what its parameters and buffers become."""
    modes = [(each, each.training) for each in module.modules()]
    tensors = dict(module.named_parameters()) | _opened(module)
    tensors |= {name: x.clone() for name, x in module.named_buffers()}
    devices = [x.device for x in module.parameters() if x.is_cuda][:1]
    try:
        module.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield partial(with_tensors, module, {name: convert(x) for name, x in tensors.items()})
    finally:
        for each, mode in modes:
            each.training = mode


@torch.no_grad()
def _opened(module: nn.Module) -> dict[str, Tensor]:
    """Copies of parameters that are all zero or tiny, with small numbers in them: a gate that begins closed, or nearly
    so, is opened by training, and what lies behind it is tried too."""
    generator, found = torch.Generator().manual_seed(1), {}
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and parameter.numel() and float(parameter.abs().max()) < CLOSED:
            small = torch.randn(parameter.shape, generator=generator) * 0.1
            found[name] = small.to(parameter.device, parameter.dtype)
    return found
