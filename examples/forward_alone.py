"""A plain module is a variant: its forward is all there is to write.

    python examples/forward_alone.py

prints that it reads a sequence in pieces, what that costs beside a variant which remembers, and how to get there:

    in pieces of 1, 7, 20 and 36 tokens the same, to less than 1e-4: True
    FLOPs of the next token after 1,024: 1,610,612,736, and of mha: 1,572,864
    decayed streams by recomputation, which is slow: its forward runs over all tokens so far for every
    new one. To make it fast, build it from parts, or write init_state and extend (CONTRIBUTING.md,
    'From a forward to kernels')

Where ATTNZOO_PLUGINS names the file, it trains and is served as any other:

    export ATTNZOO_PLUGINS=$PWD/examples/forward_alone.py
    attnzoo train --config try.yaml model.attention=decayed name=decayed
    attnzoo serve --checkpoint runs/decayed
"""

import textwrap

import torch
from torch import Tensor, nn

import attnzoo
from attnzoo.attention import ATTENTION, slow_streaming


@ATTENTION.register("decayed")
class Decayed(nn.Module):
    """Softmax attention whose scores fall with the distance, at a learned rate."""

    source = "Press et al. 2021, arXiv 2108.12409, section 3"

    def __init__(self, model_dim: int, num_heads: int = 4):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(model_dim, 3 * model_dim, bias=False)
        self.out = nn.Linear(model_dim, model_dim, bias=False)
        self.rate = nn.Parameter(torch.ones(num_heads, 1, 1))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[batch, tokens, model_dim] to the same."""
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in self.qkv(x_BTD).chunk(3, dim=-1))
        at_T = torch.arange(x_BTD.shape[1], device=x_BTD.device)
        distance_TS = at_T[:, None] - at_T
        scores = q @ k.mT / q.shape[-1] ** 0.5 - self.rate * distance_TS
        weights = scores.masked_fill(distance_TS < 0, -torch.inf).softmax(dim=-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


def main() -> None:
    """Compares the two forms, and the costs of a token."""
    torch.manual_seed(0)
    layer, x = attnzoo.attention("decayed", model_dim=256), torch.randn(1, 64, 256)
    with torch.inference_mode():
        state, pieces = layer.init_state(1, capacity=64), []
        for piece in x.split([1, 7, 20, 36], dim=1):
            y, state = layer.extend(piece, state)
            pieces.append(y)
        difference = (torch.cat(pieces, dim=1) - layer(x)).abs().max().item()
    print(f"in pieces of 1, 7, 20 and 36 tokens the same, to less than 1e-4: {difference < 1e-4}")
    mha = attnzoo.attention("mha", model_dim=256, num_heads=4)
    costs = [each.cost(1, 1, 1024).flops for each in (layer, mha)]
    print(f"FLOPs of the next token after 1,024: {costs[0]:,}, and of mha: {costs[1]:,}")
    print(textwrap.fill(slow_streaming("decayed"), 100))


if __name__ == "__main__":
    main()
