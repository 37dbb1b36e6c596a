"""How much image and how much noise there is at a time of diffusion.

The variance stays 1: x = alpha x0 + sigma noise, with alpha^2 + sigma^2 = 1. Time is lambda = log(alpha / sigma), half
of the logarithm of the signal-to-noise ratio (Kingma et al. 2021, arXiv 2107.00630; Lu et al. 2022, arXiv 2206.00927):
at -5 nearly all is noise, at 5 nearly all is image.
"""

import math

import torch
from torch import Tensor

NOISE, IMAGE = -5.0, 5.0
"""lambda where generation begins and where it ends: sigma is 0.0067 of an image at the end."""


def image_part(half_log_snr: Tensor) -> Tensor:
    """alpha, of the same shape."""
    return (2 * half_log_snr).sigmoid().sqrt()


def noise_part(half_log_snr: Tensor) -> Tensor:
    """sigma, of the same shape."""
    return (-2 * half_log_snr).sigmoid().sqrt()


def noised(x0_NCHW: Tensor, noise_NCHW: Tensor, half_log_snr_N: Tensor) -> Tensor:
    """Images with noise, [N, C, H, W]."""
    alpha, sigma = (part(half_log_snr_N)[:, None, None, None] for part in (image_part, noise_part))
    return alpha * x0_NCHW + sigma * noise_NCHW


def grid(steps: int, *, start: float = NOISE, end: float = IMAGE) -> Tensor:
    """lambda of `steps` even steps, [steps + 1], float64; from `IMAGE` to `NOISE` it is that of inversion.

    Even in lambda, because the round trip of inversion and generation then loses least (`solve`). Raises ValueError for
    fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    return torch.linspace(start, end, steps + 1, dtype=torch.float64)


def training_time(share: Tensor) -> Tensor:
    """lambda at a share, from 0 to 1, of the time of the cosine schedule (Nichol and Dhariwal 2021, arXiv 2102.09672),
    which is that of training: 0 is `IMAGE`, 1 is `NOISE`."""
    first, last = (math.atan(math.exp(-value)) for value in (IMAGE, NOISE))
    return -torch.log(torch.tan(first + (last - first) * share))
