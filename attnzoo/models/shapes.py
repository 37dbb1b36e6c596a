"""Models without weights: to know shapes and costs quickly, or to give them weights."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attnzoo.attention import Attention, build_attention, unsaved_buffers
from attnzoo.models.config import DecoderConfig
from attnzoo.models.decoder_lm import DecoderLM

DRAWS = ("normal_", "uniform_", "kaiming_uniform_", "trunc_normal_")


class _NoDraws(TorchFunctionMode):
    """Skips random initialisation: without storage it has no effect, but imports sympy (3 s, 150 MiB)."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def without_storage() -> Iterator[None]:
    """Modules built inside have shapes but no storage (device meta).

    Raises ValueError for sizes that are too large, and for a variant that reads values of tensors while it is built.
    """
    try:
        with torch.device("meta"), _NoDraws():
            yield
    except (RuntimeError, OverflowError, TypeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        if "meta" in str(error):
            raise ValueError(
                "model.attention: a variant reads values of tensors in __init__ or reset_parameters, which have none "
                "while a model is only sized, or is built to be loaded; compute with numpy or with Python's numbers, "
                f"and make a tensor of the result ({reason})"
            ) from error
        # Other errors are torch's, for numbers of more than 64 bits.
        raise ValueError(
            f"the configuration makes no model ({reason}); make its sizes smaller, or mend its variant"
        ) from error


def build_shapes(config: DecoderConfig) -> DecoderLM:
    """`DecoderLM` on the meta device, all parameters without storage. Raises ValueError as `without_storage` and
    `build_attention`."""
    with without_storage():
        return DecoderLM(config)


@torch.no_grad()
def materialise(
    model: DecoderLM, weights: Mapping[str, Tensor], device: torch.device | str, dtype: torch.dtype | None = None
) -> DecoderLM:
    """Gives a model of `build_shapes` its values; every model of a configuration and weights is made here, but for
    from_pretrained, in which transformers puts in the weights.

    weights: taken as they are, by their names in the model's `state_dict`; of several names of one parameter (a tied
    head and the embedding) any is enough. Buffers that no checkpoint holds are built anew, as `fill_buffers`. Raises
    ValueError that names a tensor which is missing, unknown, of another shape, or a number of another kind.
    """
    own, shared = model.state_dict(keep_vars=True), shared_parameters(model)
    given: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name not in own:
            raise ValueError(f"the weights hold {name}, which the model does not have")
        _check_value(name, value, own[name])
        first = shared.get(name, name)
        other = given.setdefault(first, value)
        if other is not value and not torch.equal(other, value):
            raise ValueError(f"{first} and {name} are one parameter of the model, and the weights hold two")
    missing = next((name for name in own if shared.get(name, name) not in given), None)
    if missing is not None:
        raise ValueError(f"the weights lack {missing}")
    model.load_state_dict({name: given[shared.get(name, name)] for name in own}, assign=True)
    tie_parameters(model, shared)
    fill_buffers(model, device, dtype)
    return model


def shared_parameters(module: nn.Module) -> dict[str, str]:
    """Of each parameter with several names, the first for every other one."""
    first: dict[nn.Parameter, str] = {}
    named = module.named_parameters(remove_duplicate=False)
    return {name: first[parameter] for name, parameter in named if first.setdefault(parameter, name) != name}


def tie_parameters(module: nn.Module, shared: Mapping[str, str]) -> None:
    """Makes names, as `shared_parameters` says, those of one parameter again."""
    for name, first in shared.items():
        _owner(module, name)._parameters[name.rpartition(".")[2]] = module.get_parameter(first)


def _check_value(name: str, value: Tensor, own: Tensor) -> None:
    """Raises ValueError for a tensor that is none of the model: torch would take one number for a scalar, and real
    numbers for integers."""
    if value.shape != own.shape:
        raise ValueError(f"{name} is {list(value.shape)}, and the model's is {list(own.shape)}")
    if value.dtype != own.dtype and not (value.is_floating_point() and own.is_floating_point()):
        raise ValueError(f"{name} is {value.dtype}, and the model's is {own.dtype}")


def _owner(model: nn.Module, name: str) -> nn.Module:
    """The module that keeps a tensor."""
    return model.get_submodule(name.rpartition(".")[0])


@torch.no_grad()
def fill_buffers(model: DecoderLM, device: torch.device | str, dtype: torch.dtype | None = None) -> None:
    """Fills buffers that no checkpoint holds (persistent=False) from a variant that is newly built with the same
    options, floating-point ones in `buffer_dtype`."""
    built: dict[str, Attention] = {}
    for layer, block in enumerate(model.layers()):
        for name in unsaved_buffers(block.attention):
            kind, options = model.config.layer_attention(layer)
            key = repr((kind, options))
            if key not in built:
                with torch.random.fork_rng(devices=[]):
                    built[key] = build_attention(kind, options)
            value = unsaved_buffers(built[key])[name]
            value = value.to(device, buffer_dtype(value.dtype, dtype), copy=True)
            _owner(block.attention, name)._buffers[name.rpartition(".")[2]] = value


def buffer_dtype(own: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a buffer of dtype `own` in a model with weights in `dtype`; None: `own`.

    float64 constants are so on purpose and stay, except beside weights in half precision, whose dtype all buffers take,
    as when a model is converted.
    """
    if dtype is None or not own.is_floating_point:
        return own
    return dtype if dtype.itemsize < torch.float32.itemsize else torch.promote_types(own, dtype)
