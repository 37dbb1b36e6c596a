"""A model without weights: shapes and costs at once, or a frame to load weights into."""

from collections.abc import Callable, Mapping, Sequence
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


def build_shapes(config: DecoderConfig) -> DecoderLM:
    """`DecoderLM` on the meta device, all parameters without storage."""
    with torch.device("meta"), _NoDraws():
        return DecoderLM(config)
