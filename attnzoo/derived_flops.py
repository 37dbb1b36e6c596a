"""FLOPs of a module's forward pass, counted in one run of the code itself without values."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

aten = torch.ops.aten


def forward_flops(
    module: nn.Module, *inputs: Tensor, check: Callable[[Any], object] | None = None, **others: Any
) -> int:
    """FLOPs of `module(*inputs)` in matrix products, convolutions and torch's attention, hidden pairs included.

    Inputs may be of any device, their values are not read. check: is given the output. Raises ValueError where the code
    needs values.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def of_shapes(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(q, k, v))

    on_a_cpu = {aten._scaled_dot_product_flash_attention_for_cpu: of_shapes}  # torch's list has the GPU's alone
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        given = [torch.empty(x.shape, dtype=x.dtype) for x in inputs]
        known = {id(x): _shape_of(x) for x in (*module.parameters(), *module.buffers())}
    module = copy.deepcopy(module, dict(known))
    try:
        with mode, torch.no_grad(), FlopCounterMode(display=False, custom_mapping=on_a_cpu) as counter:
            out = module(*given, **others)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"the FLOPs of {type(module).__name__} cannot be counted, because its code needs the values of tensors "
            f"({reason}); write its flops(batch, tokens)"
        ) from error
    if check is not None:
        check(out)
    return int(counter.get_total_flops())


def _shape_of(x: Tensor) -> Tensor:
    empty = torch.empty(x.shape, dtype=x.dtype)
    return nn.Parameter(empty, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else empty
