"""Plain modules that are variants for as long as a test needs them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import nn

from attnzoo.attention import ATTENTION


class Mine(nn.Module):
    """One head that looks back.

    Source: a dream
    """

    def __init__(self, model_dim: int, gain: float = 1.0):
        super().__init__()
        self.gain = gain
        self.qkv = nn.Linear(model_dim, 3 * model_dim)
        self.out = nn.Linear(model_dim, model_dim)

    def forward(self, x_BTD):
        q, k, v = self.qkv(x_BTD).chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True) * self.gain)


@contextmanager
def registered() -> Iterator[None]:
    """What is registered inside is forgotten after."""
    known = ATTENTION.names()
    try:
        yield
    finally:
        for name in set(ATTENTION.names()) - set(known):
            ATTENTION.remove(name)


def variant_of(cls: type[nn.Module], name: str = "mine_plain") -> str:
    """Registers a class; its name as a variant."""
    ATTENTION.register(name)(cls)
    return name


class Future(Mine):
    """Looks ahead."""

    def forward(self, x):
        return self.out(self.qkv(x).chunk(3, dim=-1)[2].mean(1, keepdim=True) + x)
