"""What a decoder is made of besides attention: norms, MLPs, and the pre-norm block."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnzoo.attention.base import Attention, StreamingAttention, run_torch
from attnzoo.attention.edits import EditRuns, LayerPlan, layer_plan
from attnzoo.attention.segment_memory import SegmentMemory, attend_segment
from attnzoo.derived_memory import PassMemory, pass_memory
from attnzoo.kvcache.state import State
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.common.step_inputs import StepInputs

Norm = Literal["rmsnorm", "layernorm"]
Activation = Literal["swiglu", "gelu", "quick_gelu", "relu"]


def build_norm(kind: Norm, dim: int, eps: float = 1e-5) -> nn.RMSNorm | nn.LayerNorm:
    """RMSNorm (arXiv 1910.07467) or LayerNorm (arXiv 1607.06450) with a learned gain."""
    return nn.RMSNorm(dim, eps=eps) if kind == "rmsnorm" else nn.LayerNorm(dim, eps=eps)


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), the approximation of GELU that OpenAI's CLIP was trained with (arXiv 1606.08415)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "quick_gelu": quick_gelu}


class MLP(nn.Module):
    """down(act(up x)); with "swiglu", down(silu(gate x) * up x) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, kind: Activation, dim: int, hidden: int, bias: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.gate = nn.Linear(dim, hidden, bias=bias) if kind == "swiglu" else None
        self.down = nn.Linear(hidden, dim, bias=bias)
        self.activation: Callable[[Tensor], Tensor] = ACTIVATIONS.get(kind, F.gelu)
        self.joined: Callable[[Tensor], Tensor] | None = None
        """One product for gate and up; set where weights are packed for inference."""

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            hidden = self.activation((self.joined or self.up)(x))
        elif self.joined is None:
            hidden = F.silu(self.gate(x)) * self.up(x)
        else:
            gate, up = self.joined(x).chunk(2, dim=-1)
            hidden = F.silu(gate) * up
        out: Tensor = self.down(hidden)
        return out

    def reset_parameters(self, std: float, output_std: float) -> None:
        for layer in (self.up, self.gate, self.down):
            if layer is not None:
                nn.init.normal_(layer.weight, std=output_std if layer is self.down else std)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def flops(self, batch: int, tokens: int) -> int:
        """FLOPs of `tokens` tokens of `batch` sequences: two per weight and token."""
        return 2 * batch * tokens * sum(p.numel() for p in self.parameters() if p.dim() == 2)


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, attention: StreamingAttention, mlp: MLP, norm: Norm, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.attention_norm = build_norm(norm, dim, eps)
        self.attention = attention
        self.mlp_norm = build_norm(norm, dim, eps)
        self.mlp = mlp
        extend = getattr(attention, "extend", None)  # towers hold variants that do not stream
        self._shares_steps = extend is not None and "step" in inspect.signature(extend).parameters

    def forward(self, x_BTD: Tensor, mask: Mask | None = None, edits: LayerPlan | None = None) -> Tensor:
        given: dict[str, Any] = {} if mask is None else {"mask": mask}  # a variant of someone's may take nothing but x
        given |= _edits(edits, x_BTD)
        x_BTD = x_BTD + self._mixed(self.attention(self.attention_norm(x_BTD), **given), x_BTD)
        out: Tensor = x_BTD + self.mlp(self.mlp_norm(x_BTD))
        return out

    def segment(self, x_BTD: Tensor, memory: SegmentMemory) -> tuple[Tensor, SegmentMemory]:
        """The output of a segment that also attends to its memory, and the new memory: inputs of the block."""
        mixed, memory = attend_segment(self.attention, x_BTD, memory, self.attention_norm)
        x_BTD = x_BTD + self._mixed(mixed, x_BTD)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), memory

    def training_memory(self, batch: int, tokens: int, dtype: torch.dtype, checkpointing: bool) -> PassMemory:
        """What the block holds between others in training; `checkpointing`: it keeps its input, and runs twice."""
        dim = self.attention.config.model_dim
        x_BTD = torch.empty(batch, tokens, dim, dtype=dtype, device="meta")
        run = partial(checkpoint, run_torch, use_reentrant=False) if checkpointing else run_torch
        return pass_memory(self, x_BTD, run=run, dtype=dtype, inner=True)

    def extend(
        self,
        x_BTD: Tensor,
        state: Any,
        counts_B: Tensor | None,
        edits: LayerPlan | None = None,
        step: StepInputs | None = None,
    ) -> tuple[Tensor, State]:
        """`StreamingAttention.extend`, and the MLP. step: the call as all layers share it, given to attention that
        takes it; with counts_B."""
        given = _edits(edits, x_BTD)
        if step is not None and self._shares_steps:
            given["step"] = step
        mixed, state = self.attention.extend(self.attention_norm(x_BTD), state, counts_B, **given)
        x_BTD = x_BTD + self._mixed(mixed, x_BTD)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), state

    def _mixed(self, out: Any, x_BTD: Tensor) -> Tensor:
        """The attention's output. Raises ValueError for a shape unlike the input's: the sum would broadcast it."""
        if not isinstance(out, Tensor) or out.shape != x_BTD.shape:
            found = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"{type(self.attention).__name__} returned {found} for an input of {list(x_BTD.shape)}; a "
                "variant must keep the shape of its input: correct its forward or extend"
            )
        return out


def step_of(
    states: Sequence[Any], x_BTD: Tensor, counts_B: Tensor | None, given: StepInputs | None
) -> StepInputs | None:
    """What layers share of a call, `given` or made from their states; None where no layer counts its tokens. Raises
    ValueError for one that does not fit the states."""
    lengths_B = next((state.lengths_B for state in states if hasattr(state, "lengths_B")), None)
    if given is None:
        return None if lengths_B is None else StepInputs.of(lengths_B, x_BTD.shape[1], counts_B)
    if counts_B is not None:
        raise ValueError("counts_B: step says how many tokens are real; leave counts_B out")
    if given.positions_BT.shape != x_BTD.shape[:2]:
        raise ValueError(f"step is of {list(given.positions_BT.shape)} tokens, not {list(x_BTD.shape[:2])}")
    if lengths_B is not None and lengths_B.device.type == "cpu" and not torch.compiler.is_compiling():
        begins, held = list(given.integers()[0]), lengths_B.tolist()
        if begins != held:
            raise ValueError(f"step begins at {begins}, and the state holds {held} tokens")
    return given


def attended(
    attention: Attention, x_BTD: Tensor, mask: Mask, edits: EditRuns | None, context_BSD: Tensor | None = None
) -> Tensor:
    """The output of an attention layer that is planned alone, read and edited as the runs say. context_BSD: the
    sequence that it attends to, None: its own."""
    given: dict[str, Any] = {"mask": mask}
    if context_BSD is not None:
        given["context_BSD"] = context_BSD
    plan = layer_plan(edits, 0)
    if plan is not None:
        given["edits"] = plan
    out: Tensor = attention(x_BTD, **given)
    return out


def _edits(edits: LayerPlan | None, x_BTD: Tensor) -> dict[str, Any]:
    """What attention is given of edits; sinks are found in hidden states before the norm."""
    if edits is None:
        return {}
    edits.hidden_BTD = x_BTD
    return {"edits": edits}
