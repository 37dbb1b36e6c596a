"""In-context regression: tasks, the algorithms that attention is compared with, and their closed forms.

Letters, beside the legend of `attnzoo.types`: B tasks, T examples in context (N or n in the papers), D dimension of an
input (d). A task is x_BTD with targets y_BT, one query x_BD and its target. Everything here is a pure function of
tensors; `train/experiments` trains attention against it.
"""

from attnzoo.incontext.descent import Spectrum, best_descents, chebyshev_rates, descend, newton
from attnzoo.incontext.regression import (
    Optimum,
    even_moments,
    gaussian_step,
    least_squares_step,
    mixed_preconditioner,
    odd_function_step,
)
from attnzoo.incontext.tasks import LinearFamily, Tasks, linear_tasks, ridge, seeded, sine_tasks

__all__ = [
    "LinearFamily",
    "Optimum",
    "Spectrum",
    "Tasks",
    "best_descents",
    "chebyshev_rates",
    "descend",
    "even_moments",
    "gaussian_step",
    "least_squares_step",
    "linear_tasks",
    "mixed_preconditioner",
    "newton",
    "odd_function_step",
    "ridge",
    "seeded",
    "sine_tasks",
]
