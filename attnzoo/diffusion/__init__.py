"""Diffusion: how images are noised, how a model is asked to take the noise away, and the solver that walks between.

`schedule.py` says what noise is, `solver.py` goes from noise to an image and back, `guidance.py` joins a model's
answers with and without a caption. The model is `attnzoo.models.DiffusionUNet`.
"""

from attnzoo.diffusion.guidance import guided
from attnzoo.diffusion.schedule import grid, image_part, noise_part, noised, training_time
from attnzoo.diffusion.solver import Denoiser, solve, told

__all__ = ["Denoiser", "grid", "guided", "image_part", "noise_part", "noised", "solve", "told", "training_time"]
