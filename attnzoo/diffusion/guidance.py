"""A model's answers with and without the caption, as one."""

from collections.abc import Callable

import torch
from torch import Tensor

from attnzoo.diffusion.solver import Denoiser


def guided(
    model: Callable[[Tensor, Tensor, Tensor], Tensor], words_NL: Tensor, empty_NL: Tensor, scale: float
) -> Denoiser:
    """x0 with classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): that without the caption, and from
    there `scale` times the way to that with it; 1 is the caption alone, 0 none. Both are one call of the model.

    model(x, half_log_snr_N, words) gives x0. Guidance of x0 and of noise are the same line, since each is the other
    less a multiple of x.
    """

    def denoise(x: Tensor, half_log_snr: float) -> Tensor:
        if scale in (0, 1):
            return model(x, x.new_full((len(x),), half_log_snr), words_NL if scale else empty_NL)
        twice = x.repeat(2, 1, 1, 1)
        times = x.new_full((len(twice),), half_log_snr)
        with_caption, without = model(twice, times, torch.cat([words_NL, empty_NL])).chunk(2)
        return without + scale * (with_caption - without)

    return denoise
