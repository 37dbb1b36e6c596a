"""Models without weights: to know shapes and costs quickly, or to load weights into."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from attnzoo.attention import Attention, build_attention
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
    """`DecoderLM` on the meta device, all parameters without storage. Raises ValueError as `without_storage`."""
    with without_storage():
        return DecoderLM(config)


@torch.no_grad()
def fill_buffers(
    model: DecoderLM, device: torch.device | str, dtype: torch.dtype | None = None, *, lost: bool = False
) -> None:
    """Fills buffers that no checkpoint holds (persistent=False) from a variant that is newly built with the same
    options, floating-point ones in `buffer_dtype`. lost: also those with storage of undefined contents."""
    built: dict[str, Attention] = {}
    for layer, block in enumerate(model.layers()):
        for name, buffer in unsaved_buffers(block.attention).items():
            if buffer.is_meta or lost:
                kind, options = model.config.layer_attention(layer)
                key = repr((kind, options))
                if key not in built:
                    with torch.random.fork_rng(devices=[]):
                        built[key] = build_attention(kind, options)
                buffer = unsaved_buffers(built[key])[name]
            owner, _, leaf = name.rpartition(".")
            value = buffer.to(device, buffer_dtype(buffer.dtype, dtype), copy=True)
            block.attention.get_submodule(owner)._buffers[leaf] = value


def buffer_dtype(own: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a buffer of dtype `own` in a model with weights in `dtype`; None: `own`.

    float64 constants are so on purpose and stay, except beside weights in half precision, whose dtype all buffers take,
    as when a model is converted.
    """
    if dtype is None or not own.is_floating_point:
        return own
    return dtype if dtype.itemsize < torch.float32.itemsize else torch.promote_types(own, dtype)


def unsaved_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that `state_dict` leaves out, by name."""
    saved = module.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in module.named_buffers(remove_duplicate=False) if name not in saved}
