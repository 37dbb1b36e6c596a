"""A model without weights: shapes and costs at once, or a frame to load weights into."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from attnzoo.models.config import DecoderConfig
from attnzoo.models.decoder_lm import DecoderLM

DRAWS = ("normal_", "uniform_", "kaiming_uniform_", "trunc_normal_")


class _NoDraws(TorchFunctionMode):
    """Leaves out random numbers: without storage they change nothing, but torch imports a package for symbolic algebra
    for them, which takes 3 s and 150 MiB."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def without_storage() -> Iterator[None]:
    """What is built inside has shapes and costs but takes no memory. Raises ValueError for too large sizes."""
    try:
        with torch.device("meta"), _NoDraws():
            yield
    except (RuntimeError, OverflowError, TypeError) as error:  # of torch, for numbers of more than 64 bits
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the configuration makes no model ({reason}); make its sizes smaller") from error


def build_shapes(config: DecoderConfig) -> DecoderLM:
    """`DecoderLM` on the meta device, all parameters without storage. Raises ValueError for too large sizes."""
    with without_storage():
        return DecoderLM(config)
