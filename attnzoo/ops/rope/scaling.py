"""Rotary frequencies scaled for contexts longer than in the first training."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from attnzoo.types import build_config


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How frequencies change; `factor` is the ratio of the new context to the old.

    "linear": every frequency is divided by `factor` (position interpolation, Chen et al. 2023, arXiv 2306.15595).
    "llama3": only those whose wavelength exceeds original_max_positions / low_freq_factor; those shorter than
    original_max_positions / high_freq_factor stay, and between the two lies a linear ramp in 1 / wavelength (the
    released configuration of Llama 3.1). Raises ValueError naming the field.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"rope_scaling.factor={self.factor} must be at least 1: it divides frequencies")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope_scaling.low_freq_factor={self.low_freq_factor} must lie between 0 and "
                f"high_freq_factor={self.high_freq_factor}"
            )
        if self.original_max_positions < 1:
            raise ValueError(f"rope_scaling.original_max_positions={self.original_max_positions} must be at least 1")

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> "RopeScaling | None":
        """Reads a configuration's mapping. Raises ValueError naming an unknown field."""
        return None if values is None else build_config(cls, values, "rope_scaling")


def frequencies(half: int, theta: float, scaling: RopeScaling | None, like: Tensor) -> Tensor:
    """Angle per position of each of `half` channel pairs; dtype and device of `like`."""
    plain = theta ** (-torch.arange(half, dtype=like.dtype, device=like.device) / half)
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    turns = scaling.original_max_positions * plain / (2 * math.pi)
    ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = ramp.clamp(0.0, 1.0)
    return kept * plain + (1.0 - kept) * plain / scaling.factor
