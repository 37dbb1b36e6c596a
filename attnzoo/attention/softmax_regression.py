"""Softmax attention of a whole context, the query not read: the form in which softmax regression is studied in context.

Source: Li, Song, Xia, Yu, Zhou 2023, "The Closeness of In-Context Learning and Weight Shifting for Softmax Regression"
(arXiv 2304.13276), section 1; the same layer is the softmax variant of von Oswald et al. 2023 (arXiv 2212.07677, A.9).

    e_t <- e_t + P sum_{j<=N} W_V e_j exp((W_K e_j)^T W_Q e_t) / sum_i exp((W_K e_i)^T W_Q e_t)

For softmax regression f(x) = exp(A x) / <exp(A x), 1> tokens are (a_j, n b_j - 1): rows of A and centred targets. With
small scores s_j the weights are (1 + s_j - mean s) / n, and because centred values add up to 0 a head is the sum of
v_j s_j / n, one step of gradient descent on the linearised loss: `set_linearised_step` writes such weights.

Differs from the paper: scores are not divided by sqrt(head_dim) (the maps are free); the residual is the caller's.
"""

import torch

from attnzoo.attention.base import ATTENTION
from attnzoo.attention.in_context import InContextAttention, InContextConfig
from attnzoo.attention.parts import SoftmaxMixing, Unscaled


@ATTENTION.register("softmax_regression")
class SoftmaxRegression(InContextAttention):
    """Softmax attention of a whole context, the query not read; a head is near a step on softmax regression."""

    source = "Li et al. 2023, arXiv 2304.13276, section 1"

    def __init__(self, config: InContextConfig) -> None:
        super().__init__(config, SoftmaxMixing(config.heads, Unscaled()))

    @torch.no_grad()
    def set_linearised_step(self, rate: float, sharpness: float) -> None:
        """One head that adds rate / sharpness * sum_j softmax_j(sharpness a_j . a_t) y_j to the last coordinate: as
        sharpness goes to 0 and if the y_j add up to 0, rate / n * sum_j y_j a_j . a_t.

        Raises ValueError for several heads, head_dim other than model_dim, or sharpness <= 0.
        """
        if self.config.num_heads != 1 or sharpness <= 0:
            raise ValueError(
                f"num_heads={self.config.num_heads}, sharpness={sharpness}: the construction has one head and a "
                "positive sharpness"
            )
        inputs_D = torch.ones(self.config.model_dim, dtype=self.projection.output.weight.dtype)
        inputs_D[-1] = 0.0
        self.set_products(sharpness * torch.diag(inputs_D)[None], rate / sharpness * torch.diag(1 - inputs_D)[None])
