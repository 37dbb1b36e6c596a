"""Linear self-attention on in-context tasks in Gram form: the context C enters only through G = C^T C.

A layer adds e W_QK G W_VP to every token e (a row), with W_QK = W_Q^T W_K and W_VP = W_V^T P^T; the query is neither
key nor value. For the context itself this turns G into M^T G M with M = I + W_QK G W_VP. So all matrices are at most [D
+ 1, D + 1] for each task, for any number of layers.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from attnzoo.incontext import Tasks


class GramAttention(nn.Module):
    """`depth` layers of linear self-attention on tokens of `width` = D + 1. looped: all layers share one layer's
    weights. std: of the initial weights."""

    def __init__(self, width: int, depth: int, *, looped: bool, std: float, generator: torch.Generator) -> None:
        super().__init__()
        self.depth, layers = depth, 1 if looped else depth
        self.qk_LEE = nn.Parameter(std * torch.randn(layers, width, width, generator=generator))
        self.vp_LEE = nn.Parameter(std * torch.randn(layers, width, width, generator=generator))

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """(W_QK, W_VP) of a layer."""
        index = min(index, len(self.qk_LEE) - 1)
        return self.qk_LEE[index], self.vp_LEE[index]

    def forward(self, tasks: Tasks, depth: int | None = None, damping: float = 1.0) -> Tensor:
        """Predictions [B]: minus the last coordinate of the query's token after the last layer. depth: number of layers
        to apply. damping: factor of each layer's update."""
        return -self.states(tasks, self.depth if depth is None else depth, damping)[-1][:, -1]

    def states(self, tasks: Tasks, depth: int, damping: float = 1.0) -> list[Tensor]:
        """The query's token [B, D + 1] after each layer."""
        gram_BEE = tasks.gram()
        e_BE = torch.cat([tasks.query_BD, torch.zeros_like(tasks.target_B)[:, None]], dim=1)
        found = []
        for index in range(depth):
            qk_EE, vp_EE = self.layer(index)
            update_BEE = damping * (qk_EE @ gram_BEE @ vp_EE)
            e_BE = e_BE + (e_BE[:, None] @ update_BEE)[:, 0]
            found.append(e_BE)
            if index < depth - 1:
                step_BEE = torch.eye(len(qk_EE), dtype=qk_EE.dtype) + update_BEE
                gram_BEE = step_BEE.mT @ gram_BEE @ step_BEE
        return found


def fit(
    module: nn.Module,
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    rate: float,
    tick: Callable[[], None] = lambda: None,
    clip: float = 1.0,
    warmup: int = 50,
) -> list[float]:
    """Trains with Adam, and a learning rate with warmup and cosine decay; returns the loss of every step.

    loss: loss(step) draws a batch and returns its loss. A batch whose loss or gradient is not finite is skipped,
    because many layers of linear attention are a polynomial of high degree, which overflows on rare contexts. Raises
    RuntimeError if more than one batch in fifty is skipped.
    """
    optimiser = torch.optim.Adam(module.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _scale(step, steps, warmup))
    losses: list[float] = []
    left_out = 0
    for step in range(steps):
        optimiser.zero_grad()
        value = loss(step)
        value.backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), clip)
        if bool(torch.isfinite(norm)) and bool(torch.isfinite(value)):
            optimiser.step()
            losses.append(value.item())
        else:
            left_out += 1
            losses.append(losses[-1] if losses else value.item())
        if left_out > max(1, steps // 50):
            raise RuntimeError(f"{left_out} losses up to step {step} were not finite; lower the rate {rate}")
        schedule.step()
        tick()
    return losses


def _scale(step: int, steps: int, warmup: int) -> float:
    rising = min(1.0, (step + 1) / warmup)
    falling = 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * step / steps))))
    return rising * falling


def half_square(prediction_B: Tensor, target_B: Tensor) -> Tensor:
    """.5 mean (y - yhat)^2, as in arXiv 2212.07677."""
    return 0.5 * (prediction_B - target_B).square().mean()
