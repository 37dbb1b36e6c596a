"""What a layer is given, checked before anything is computed: types and shapes, which cost no time to look at, and
values where nobody has to wait for them."""

import operator
from typing import Any

import torch
from torch import Tensor

from attnzoo.ops.common.masks import Mask, MaskField

MASK_WORDS: dict[MaskField, str] = {
    "causal": "causal masks",
    "full": "masks that show all keys (causal=False)",
    "prefix": "prefix_B",
    "starts": "starts_BT",
    "keys": "keys_BS",
    "pairs": "pairs",
}


def check_tensor(name: str, what: str, value: Any, example: str) -> None:
    """Raises ValueError for what is no tensor; example: what to give."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} got {what}, a {type(value).__name__}; give a tensor, {example}")


def check_room(name: str, batch: Any, capacity: Any) -> None:
    """Raises ValueError unless both are whole numbers from 0 on."""
    for what, value in (("batch", batch), ("capacity", capacity)):
        try:
            whole = not isinstance(value, bool) and operator.index(value) >= 0
        except TypeError:
            whole = False
        if not whole:
            counted = "sequences" if what == "batch" else "tokens of each"
            raise ValueError(f"{name}.init_state got {what}={value!r}; it must be a number of {counted}, from 0 on")


def check_state(name: str, state: Any, kind: type | tuple[type, ...], sizes: dict[str, tuple[Any, ...]]) -> None:
    """Raises ValueError for a state of another kind or other sizes than the layer's.

    sizes: shapes that tensors of the state must have, by name; None: any size along that axis.
    """
    if not isinstance(state, kind):
        other = "no state" if state is None else f"a {type(state).__name__}"
        raise ValueError(f"{name} got {other} where it needs a state of its own; begin with this layer's init_state")
    for what, right in sizes.items():
        shape = tuple(getattr(state, what).shape)
        if len(shape) != len(right) or any(size not in (None, had) for size, had in zip(right, shape, strict=True)):
            asked = ", ".join("any" if size is None else str(size) for size in right)
            raise ValueError(
                f"{name} got the state of another layer: its {what} has shape {list(shape)}, and this layer's has "
                f"[{asked}]; begin with this layer's init_state"
            )


def check_counts(name: str, counts_B: Any, batch: int, tokens: int) -> None:
    """Raises ValueError for counts that are not 0..T of each sequence."""
    check_tensor(name, "counts_B", counts_B, f"torch.tensor([...]) of {batch} numbers")
    if counts_B.shape != (batch,) or counts_B.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{name} got counts_B of {counts_B.dtype} and shape {list(counts_B.shape)}; it must be int64 of [{batch}]"
        )
    if known_wrong((counts_B < 0) | (counts_B > tokens)):
        raise ValueError(f"{name} got counts_B={counts_B.tolist()}; they must lie between 0 and the chunk's {tokens}")


def check_dtype(name: str, what: str, x: Tensor, linear: torch.nn.Module) -> None:
    """Raises ValueError for numbers in another dtype than the weights of a linear map, unless autocast converts them.
    A map that someone has put in its place, such as one of quantised weights, takes what it takes."""
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.is_meta:
        return
    dtype = weight.dtype
    if x.dtype != dtype and not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
        raise ValueError(
            f"{name} got {what} in {x.dtype}, and its weights are in {dtype}; convert one of them: {what}.to({dtype}), "
            f"or layer.to({x.dtype})"
            if x.is_floating_point()
            else f"{name} got {what} in {x.dtype}; it must hold numbers in the dtype of the weights, {dtype}"
        )


def check_mask(layer: Any, x_BTD: Tensor, context_BSD: Tensor | None, mask: Any) -> None:
    """Raises ValueError for a mask that the layer's traits rule out, or that does not fit x and the context."""
    name, traits = type(layer).__name__, layer.traits
    if not isinstance(mask, Mask):
        raise ValueError(f"mask is a {type(mask).__name__}; give a Mask, for example Mask(pairs=...) of booleans")
    beyond = sorted(mask.uses - traits.masks)
    if beyond:
        raise ValueError(
            f"mask: {name} cannot compute {', '.join(MASK_WORDS[field] for field in beyond)}; "
            f"it takes {', '.join(MASK_WORDS[field] for field in sorted(traits.masks)) or 'no mask'}"
            f"{layer.way_out()}"
        )
    if mask.window is not None or not mask.parallel:
        given = "positions are those of a streaming state" if mask.window is None else "window is the layer's own"
        raise ValueError(f"mask: {given} and not given to forward; leave it out, or build {name} with it")

    read_BSD = x_BTD if context_BSD is None else context_BSD
    fields = (("keys_BS", mask.keys_BS, read_BSD), ("starts_BT", mask.starts_BT, x_BTD))
    for what, tensor, of in fields:
        if tensor is not None and tensor.shape != of.shape[:2]:
            raise ValueError(
                f"mask: {what} of {name} has shape {list(tensor.shape)}; it must be {list(of.shape[:2])}, one for "
                "each token"
            )
    tokens = x_BTD.shape[1]
    if mask.starts_BT is not None and known_wrong(
        (mask.starts_BT > torch.arange(tokens, device=x_BTD.device)) | (mask.starts_BT < 0)
    ):
        raise ValueError(
            f"mask: starts_BT of {name} has a start after its own token, or below 0; a token sees itself at least"
        )
    if mask.prefix_B is not None and known_wrong((mask.prefix_B < 0) | (mask.prefix_B > tokens)):
        raise ValueError(
            f"mask: prefix_B={mask.prefix_B.tolist()} of {name} counts the first tokens of each row; it must lie "
            f"between 0 and {tokens}"
        )


def known_wrong(wrong: Tensor) -> bool:
    """Whether any value is known to be True: on a GPU, in compiled code and without values nobody looks."""
    return not torch.compiler.is_compiling() and wrong.device.type == "cpu" and bool(wrong.any())
