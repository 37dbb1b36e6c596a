"""Products of many rows in float32, for weights that stay in fewer bits.

Processors without instructions for bfloat16 multiply it three times and more slower than float32. A prompt's chunk has
enough rows to pay for widening the weight anew in every product, so that no second copy of the weights is kept: in
passing, a product holds four bytes for each number of its weight.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention.parts import Projection
from attnzoo.models.blocks import MLP
from attnzoo.models.decoder_lm import DecoderLM
from attnzoo.models.packing import PackedLinear, PackedMaps, onednn_product

MANY = 32
"""Tokens of a chunk from which on its products are computed in float32. It is the number of one sequence's tokens in
one call, whatever else is computed in the call: a prompt that is read in the same chunks gets the same values."""
TRIES, ENOUGH_S = 3, 0.03
"""Turns of each alternative in a measurement: so many, and more while they take less than so many seconds."""


@dataclass(frozen=True)
class Wide:
    """Products in float32 of chunks of `rows` tokens or more.

    keeps: the result stays in float32, for a function of each number alone before the next map; else it is rounded to
    the weight's dtype. What is in float32 already comes from such a map, and is computed likewise.
    """

    rows: int
    keeps: bool = False

    def __call__(
        self, x: Tensor, weight: Callable[[], Tensor], bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor | None:
        """The map of x [B, T, D]; None where T is less than `rows`, or x has other axes: then x is not for it. weight:
        gives the map's weight in float32, and dtype is the one that it is kept in."""
        if x.dtype == dtype and (x.dim() != 3 or x.shape[1] < self.rows):
            return None
        product = onednn_product if torch.backends.mkldnn.is_available() else F.linear
        out: Tensor = product(x.float(), weight(), None if bias is None else bias.float())
        return out if self.keeps else out.to(dtype)


class WideLinear(nn.Linear):
    """A linear map with the weight and bias of `layer`, whose products of many rows are in float32."""

    def __init__(self, layer: nn.Linear, wide: Wide) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias, self.wide = layer.weight, layer.bias, wide

    def forward(self, input: Tensor) -> Tensor:
        found = self.wide(input, self.weight.float, self.bias, self.weight.dtype)
        return super().forward(input) if found is None else found


def can_widen(model: DecoderLM) -> bool:
    """Whether the model is on a CPU and its weights have fewer bits than float32."""
    weight = model.embedding.weight
    return weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16)


@torch.no_grad()
def widen_products(model: DecoderLM, rows: int = MANY) -> DecoderLM:
    """Computes the maps of all blocks in float32, in place, where a sequence has `rows` tokens or more in a call.
    Weights and states keep their dtype, and so does what goes from map to map, except inside an MLP. Comes after
    `pack_weights`, if that is called. Raises ValueError where `can_widen` says no.
    """
    if not can_widen(model):
        weight = model.embedding.weight
        raise ValueError(f"weights in {weight.dtype} on {weight.device} are not widened; leave them as they are")
    for module in list(model.blocks.modules()):
        if isinstance(module, Projection):
            _widen(module, ("query", "key", "value"), Wide(rows))
            _widen(module, ("output",), Wide(rows))
        elif isinstance(module, MLP):
            _widen(module, ("up", "gate"), Wide(rows, keeps=True))
            _widen(module, ("down",), Wide(rows))
    model.many_rows = rows
    return model


def _widen(module: Projection | MLP, names: tuple[str, ...], wide: Wide) -> None:
    """Widens the module's maps of these names, which have one input."""
    if len(names) > 1 and isinstance(module.joined, PackedMaps):
        module.joined.wide = wide
        return
    for name in names:
        layer = getattr(module, name)
        if isinstance(layer, PackedLinear):
            layer.maps.wide = wide
        elif layer is not None:
            setattr(module, name, WideLinear(layer, wide))


@torch.inference_mode()
def product_times(model: DecoderLM) -> tuple[float, float]:
    """Seconds of a product of `MANY` rows with the second map of the first MLP: as the weights are, and in float32; the
    best of some turns, which take some tens of milliseconds in all. More rows are in favour of float32."""
    down = model.layers()[0].mlp.down
    dtype = model.embedding.weight.dtype
    wide: Callable[[Tensor], Tensor | None]
    if isinstance(down, PackedLinear):
        wide = partial(Wide(MANY), weight=down.maps.float32_weight, bias=down.maps.bias, dtype=dtype)
    else:
        wide = WideLinear(down, Wide(MANY))
    x_1TD = torch.randn(1, MANY, down.in_features).to(dtype)
    best, begin, turns = [float("inf")] * 2, time.perf_counter(), 0
    while turns < TRIES or time.perf_counter() - begin < ENOUGH_S:
        for index, product in enumerate((down, wide)):
            started = time.perf_counter()
            product(x_1TD)
            best[index] = min(best[index], time.perf_counter() - started)
        turns += 1
    return best[0], best[1]
