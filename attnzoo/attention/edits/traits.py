"""What a variant lets be read and changed of its attention, and the sizes of a layer that plans need."""

from dataclasses import dataclass
from typing import Any

import torch

from attnzoo.types import accumulation_dtype


@dataclass(frozen=True, kw_only=True)
class Editing:
    """What can be done to a variant's attention. scores, weights: edited; reads: read; softmax: its weights are a
    softmax of scores; bounded: they are at most 1; streams: also in `extend`, not in `forward` alone. why_not: the
    reason for what cannot, in words for users."""

    softmax: bool = True
    bounded: bool = True
    scores: bool = False
    weights: bool = False
    reads: bool = False
    streams: bool = True
    why_not: str = ""


NO_EDITING = Editing(why_not="it computes its attention by itself, not by attnzoo.attention.parts")
SOFTMAX_EDITING = Editing(scores=True, weights=True, reads=True)


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """One layer, as plans see it. variant: its name, for messages; context: its keys are those of another sequence;
    scores_in, outputs_in: the dtypes of its scores and outputs."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    variant: str
    editing: Editing = SOFTMAX_EDITING
    context: bool = False
    model_dim: int | None = None
    scores_in: torch.dtype = torch.float32
    outputs_in: torch.dtype = torch.float32

    def difference(self, layer: "LayerSizes") -> str:
        """In what a layer is not the planned one, so that the plan does not hold for it; "" where it does."""
        if (self.variant, self.editing) != (layer.variant, layer.editing):
            also = " with other options" if self.variant == layer.variant else ""
            return f"attention of {self.variant}, and the layer is {layer.variant}{also}"
        if self.num_heads != layer.num_heads:
            return f"{self.num_heads} query heads, and the layer has {layer.num_heads}"
        for what in ("scores", "outputs"):
            planned, found = (getattr(size, f"{what}_in") for size in (self, layer))
            if torch.finfo(planned).max > 2 * torch.finfo(found).max:  # bfloat16 holds about what float32 does
                planned, found = (str(dtype).removeprefix("torch.") for dtype in (planned, found))
                return f"{what} in {planned}, and those of the layer are {found}, which holds smaller numbers"
        return ""


def layer_sizes(attention: Any, *, context: bool = False) -> LayerSizes:
    """The sizes of an attention layer. context: its keys are those of another sequence."""
    heads = getattr(getattr(attention, "mixing", None), "heads", None)
    weight = next((x for x in attention.parameters() if x.is_floating_point()), torch.empty(0))
    return LayerSizes(
        num_heads=getattr(heads, "num_heads", 1),
        num_kv_heads=getattr(heads, "num_kv_heads", 1),
        head_dim=getattr(heads, "head_dim", 1),
        variant=type(attention).__name__,
        editing=attention.editing,
        context=context,
        model_dim=attention.config.model_dim,
        scores_in=accumulation_dtype(weight.dtype),
        outputs_in=weight.dtype,
    )
