"""Attention with its own maps over whatever a mask shows of a sequence or of a context, as a plain module."""

from torch import Tensor, nn

from attnzoo.attention import ATTENTION
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.sdpa import sdpa


@ATTENTION.register("reads")
class Reads(nn.Module):
    """Softmax attention with a gate; queries read what the mask shows.

    Source: Qiu et al. 2025, arXiv 2505.06708, section 2
    """

    def __init__(self, model_dim: int, num_heads: int = 4):
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.gate = (nn.Linear(model_dim, model_dim, bias=False) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor | None, mask: Mask) -> Tensor:
        read = x if context is None else context
        maps = ((self.query, x), (self.key, read), (self.value, read))
        q, k, v = (project(y).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for project, y in maps)
        mixed = sdpa(q, k, v, mask=mask).transpose(1, 2).flatten(2)
        return mixed * self.gate(x).sigmoid()
