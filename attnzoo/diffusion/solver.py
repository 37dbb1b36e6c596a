"""The deterministic walk between noise and image, second order, in both directions.

Source: DPM-Solver++ (2M) of Lu et al. 2022, "DPM-Solver++", arXiv 2211.01095, algorithm 2, which is the exponential
integrator of d(x / sigma) / d lambda = exp(lambda) x0(x, lambda), with x0 continued by a line through its last two
values. Walked from image to noise the same formula inverts: it needs no other class.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from attnzoo.diffusion.schedule import image_part, noise_part

Denoiser = Callable[[Tensor, float], Tensor]
"""From (x [N, C, H, W], lambda) to the image x0 that a model sees in it."""


def told(denoise: Denoiser, tell: Callable[[Tensor], None] | None) -> Denoiser:
    """The same denoiser; `tell` is given each x0 that it has found, and may raise to end the walk."""

    def telling(x: Tensor, half_log_snr: float) -> Tensor:
        x0 = denoise(x, half_log_snr)
        if tell is not None:
            tell(x0)
        return x0

    return telling


def solve(
    x: Tensor, denoise: Denoiser, half_log_snr: Tensor, *, watch: Callable[[int, Tensor], Tensor] | None = None
) -> Tensor:
    """x at the last of the times `half_log_snr` (`attnzoo.diffusion.grid`), from x at the first; one call of
    `denoise` a step. At the end of a walk to the image, what is left of the noise stays in it.

    watch(step, x) sees x after each step and returns the x to go on with. Raises ValueError for fewer than two times
    and for times that do not rise, or do not fall, throughout.
    """
    steps = half_log_snr.diff()
    if half_log_snr.dim() != 1 or not len(steps) or not bool((steps > 0).all() | (steps < 0).all()):
        raise ValueError(f"half_log_snr={half_log_snr.tolist()} must be two times or more that only rise or only fall")
    alpha, sigma = image_part(half_log_snr).tolist(), noise_part(half_log_snr).tolist()
    before = None
    for step, change in enumerate(steps.tolist()):
        x0 = denoise(x, float(half_log_snr[step]))
        aim = x0
        if before is not None:
            earlier, its_change = before
            aim = x0 + (x0 - earlier) * (change / (2 * its_change))
        x = (sigma[step + 1] / sigma[step]) * x - alpha[step + 1] * float(torch.expm1(torch.tensor(-change))) * aim
        before = x0, change
        if watch is not None:
            x = watch(step, x)
    return x
