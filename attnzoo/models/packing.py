"""Weights packed for inference on a CPU: in the layout that oneDNN's products read fastest, maps of one input joined.

Decoding reads every weight once per token, so memory bandwidth limits it; torch's own layout reaches about half.
"""

from collections.abc import Callable
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from attnzoo.attention.parts import Projection
from attnzoo.models.blocks import MLP
from attnzoo.models.decoder_lm import DecoderLM

ROWS = {torch.bfloat16: 1, torch.float32: 64}
"""How many rows of input the layout is made for. Measured: any number is as good in bfloat16; in float32, a layout for
one row costs sixteen rows a third of their speed, and a layout for 64 costs one row nothing."""


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None, width: int = 0) -> Tensor:
    """x W^T + b by oneDNN; the weight may be packed. width: for the compiler alone."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


# The compiler sees an operation with a known output shape: it has no rule for packed weights that are arguments.
_LIBRARY = torch.library.Library("attnzoo", "FRAGMENT")
_LIBRARY.define("packed_linear(Tensor x, Tensor weight, Tensor? bias, int width) -> Tensor")
_LIBRARY.impl("packed_linear", onednn_product, "CompositeExplicitAutograd")
torch.library.register_fake(
    "attnzoo::packed_linear", lambda x, weight, bias, width: x.new_empty(*x.shape[:-1], width), lib=_LIBRARY
)


OtherWay = Callable[[Tensor, Callable[[], Tensor], Tensor | None, torch.dtype], Tensor | None]
"""The outputs for an input, by the weight in float32, the bias, and the weight's dtype; None: the usual way."""


class PackedMaps:
    """One product for one or several linear maps of the same input; calling it gives their outputs side by side."""

    def __init__(self, *maps: nn.Linear) -> None:
        weight = torch.cat([layer.weight.detach() for layer in maps])
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS[weight.dtype])
        biases = [weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach() for layer in maps]
        self._width, self.dtype = len(weight), weight.dtype
        self.bias = None if all(layer.bias is None for layer in maps) else torch.cat(biases)
        self.wide: OtherWay | None = None
        """Another way for some inputs (`attnzoo.models.widening.Wide`)."""

    def float32_weight(self) -> Tensor:
        """The weight in float32, as torch keeps one; made anew in every call."""
        weight: Tensor = self._weight.to_dense(torch.float32)
        return weight

    def __call__(self, x: Tensor) -> Tensor:
        found = None if self.wide is None else self.wide(x, self.float32_weight, self.bias, self.dtype)
        if found is not None:
            return found
        if torch.compiler.is_compiling():
            opaque: Tensor = torch.ops.attnzoo.packed_linear.default(x, self._weight, self.bias, self._width)
            return opaque
        return onednn_product(x, self._weight, self.bias)


class PackedLinear(nn.Linear):
    """A linear map with a packed weight; `weight` and `bias` only have shapes (device meta)."""

    def __init__(self, layer: nn.Linear) -> None:
        options = {"device": "meta", "dtype": layer.weight.dtype}
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, **options)
        self.requires_grad_(False)
        self.maps = PackedMaps(layer)

    def forward(self, input: Tensor) -> Tensor:
        return self.maps(input)


class PackedDecoderLM(DecoderLM):
    """What `pack_weights` makes of a model: it computes the same, and refuses with a ValueError whatever would need its
    weights as torch keeps them."""

    def _refuse(self, *args: Any, **options: Any) -> NoReturn:
        raise ValueError(
            "the model's weights are packed for inference: they cannot be read, loaded, converted, moved, copied or "
            "pickled; load it with pack_weights=False"
        )

    state_dict = load_state_dict = __reduce_ex__ = _refuse

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`to`, `half`, `cuda` and the like."""
        weight = self.embedding.weight[:0]
        changed = fn(weight)
        if (changed.dtype, changed.device) != (weight.dtype, weight.device):
            self._refuse()
        return self


def can_pack(model: DecoderLM) -> bool:
    """Whether the model is on a CPU that has a product for packed weights of its dtype."""
    weight = model.embedding.weight
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    half = weight.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return half or weight.dtype == torch.float32


@torch.no_grad()
def pack_weights(model: DecoderLM) -> DecoderLM:
    """Packs the linear maps of blocks and head, in place: the model can then be run, but neither trained nor saved
    (`PackedDecoderLM`), and its maps keep their weights whatever is written to `parameters()`.

    Maps are packed one at a time, so memory does not grow, except for a tied head, which no longer shares the
    embedding's table. Raises ValueError where `can_pack` says no.
    """
    if not can_pack(model):
        weight = model.embedding.weight
        raise ValueError(f"weights in {weight.dtype} on {weight.device} cannot be packed; leave them as they are")
    for module in list(model.blocks.modules()):
        if isinstance(module, Projection):
            module.joined = _joined(module.query, module.key, module.value)
            module.output = PackedLinear(module.output)
        elif isinstance(module, MLP):
            module.joined = _joined(*(layer for layer in (module.gate, module.up) if layer is not None))
            module.down = PackedLinear(module.down)
    head = PackedLinear(model.head)
    if model.config.tie_embeddings:
        head.weight = model.embedding.weight  # still one parameter, for those who count parameters
    model.head = head
    model.__class__ = PackedDecoderLM
    return model


def _joined(*maps: nn.Linear) -> PackedMaps:
    joined = PackedMaps(*maps)
    for layer in maps:
        # Parameters can still be counted; a product with them fails.
        layer.weight = nn.Parameter(layer.weight.to("meta"), requires_grad=False)
    return joined
