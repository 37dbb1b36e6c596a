"""In-context linear self-attention: no softmax, mask, norm or bias, and the query is not read.

Source: von Oswald et al. 2023, "Transformers Learn In-Context by Gradient Descent" (arXiv 2212.07677), eq. 1 and
proposition 1; GD++ from its appendix A.10.

    e_t <- e_t + P sum_{j<=N} W_V e_j (W_K e_j)^T W_Q e_t,   tokens e_j = (x_j, y_j), the query (x_q, 0) last

One layer can be one step of gradient descent on .5 sum_j (w . x_j - y_j)^2 from w = W0: `set_gradient_step` writes such
weights, the prediction is then minus the last coordinate of the query's token.

Differs from the paper: nothing; the residual is the caller's, and several heads are added up.
"""

import torch
from torch import Tensor

from attnzoo.attention.base import ATTENTION
from attnzoo.attention.in_context import InContextAttention, InContextConfig
from attnzoo.attention.parts import LinearMixing


@ATTENTION.register("in_context_linear")
class InContextLinear(InContextAttention):
    """Linear attention of a whole context, the query not read; one layer is a step of gradient descent."""

    source = "von Oswald et al. 2023, arXiv 2212.07677, eq. 1"

    def __init__(self, config: InContextConfig) -> None:
        super().__init__(config, LinearMixing(config.heads, feature_map="identity", normalise=False, decay=False))

    @torch.no_grad()
    def set_gradient_step(self, rate: float, start_D: Tensor | None = None, shrink: float = 0.0) -> None:
        """Weights of one step with rate `rate` (eta / N in the paper) from the weights `start_D` (None: 0).

        W_K = W_Q = diag(I, 0), W_V = [[0, 0], [W0, -1]] and P = rate diag(0, 1) add rate (W0 . x_j - y_j) x_j . x_t
        to the last coordinate: y_t becomes y_t - dW . x_t, and the query's 0 becomes -dW . x_q. With `shrink` the
        layer is one of GD++: [[-shrink I, 0], ...] in P W_V turns X into X (I - shrink X^T X). Raises ValueError for
        several heads, or head_dim other than model_dim.
        """
        if self.config.num_heads != 1:
            raise ValueError(f"num_heads={self.config.num_heads}: the construction has one head")
        dim = self.config.model_dim
        inputs_D = torch.ones(dim, dtype=self.projection.output.weight.dtype)
        inputs_D[-1] = 0.0
        value_output_DD = torch.diag(-shrink * inputs_D)
        value_output_DD[-1, -1] = -rate
        if start_D is not None:
            value_output_DD[:-1, -1] = rate * start_D
        self.set_products(torch.diag(inputs_D)[None], value_output_DD[None])
