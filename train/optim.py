"""AdamW for all parameters, or Muon for the weights of linear layers and AdamW for the rest.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) replaces the momentum of a weight matrix by the
nearest semi-orthogonal matrix, found with a Newton-Schulz iteration, times sqrt(max(1, rows / columns)). It needs whole
matrices, but ZeRO gives an optimizer flat partitions. So `train.engine` describes where the matrices lie in them
(`ShardLayout`). Momentum stays partitioned; one all-gather for each group makes the matrices whole, and each rank
iterates on the matrices of which it holds a part.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.config import OptimConfig


@dataclass(frozen=True)
class MatrixSlot:
    """A matrix inside flat tensors: its shape, and its offset and length, whose meaning `ShardLayout` explains."""

    shape: tuple[int, int]
    offset: int
    length: int


@dataclass(frozen=True)
class ShardLayout:
    """How a rank's flat tensor of `numel` elements maps to whole matrices.

    cut_each False (ZeRO 1 and 2): the concatenated tensors of all ranks hold one matrix after the other, and offsets
    count from the beginning of rank 0's tensor. cut_each True (ZeRO 3): every matrix is partitioned over all ranks, and
    a slot has offset and length of a piece, the same on every rank; the last piece is padded.
    """

    slots: tuple[MatrixSlot, ...]
    numel: int
    rank: int
    world: int
    group: Any
    cut_each: bool


def matrix_parameters(model: nn.Module) -> list[Tensor]:
    """Weights of linear layers that Muon may take: those that the model's own `matrix_parameters` names (a `DecoderLM`
    names the ones in blocks), or all of them."""
    own: Any = getattr(model, "matrix_parameters", None)
    return _linear_weights(model) if own is None else [parameter for _, parameter in own()]


def _linear_weights(model: nn.Module) -> list[Tensor]:
    """Each once, without those that are an embedding's too."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    weights = {id(module.weight): module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    return [weight for key, weight in weights.items() if key not in tables]


def param_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Parameter groups for `MatrixAdamW`: matrices; weights of other linear layers (an untied head), with weight decay;
    the rest, without it.

    Convolution kernels, position tables, embeddings, norms and biases have neither weight decay nor Muon. Frozen
    parameters and empty groups are left out. Raises ValueError if no parameter trains.
    """
    matrices = [p for p in matrix_parameters(model) if p.requires_grad]
    taken = {id(p) for p in matrices}
    head = [p for p in _linear_weights(model) if id(p) not in taken and p.requires_grad]
    taken |= {id(p) for p in head}
    rest = [p for p in model.parameters() if id(p) not in taken and p.requires_grad]
    muon = config.name == "muon"
    groups = [
        {"name": "matrices", "params": matrices, "weight_decay": config.weight_decay, "orthogonal": muon},
        {"name": "head", "params": head, "weight_decay": config.weight_decay, "orthogonal": False},
        {"name": "rest", "params": rest, "weight_decay": 0.0, "orthogonal": False},
    ]
    for group in groups:
        group["peak_lr"] = group["lr"] = config.muon_lr if group["orthogonal"] else config.lr
        group["momentum"] = config.momentum
        group["newton_schulz_steps"] = config.newton_schulz_steps
    filled = [group for group in groups if group["params"]]
    if not filled:
        raise ValueError("nothing to train: every parameter of the model is frozen (requires_grad is false)")
    return filled


def build_optimizer(model: nn.Module, config: OptimConfig) -> "MatrixAdamW":
    """The optimizer of a run."""
    return MatrixAdamW(param_groups(model, config), lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


def set_rate(optimizer: Any, factor: float) -> None:
    """Scales the learning rate of every group to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


class MatrixAdamW(torch.optim.AdamW):
    """torch's AdamW, but groups with `orthogonal` are updated by Muon (with decoupled weight decay).

    layouts: `ShardLayout` by id of a flat parameter; parameters without one must be whole matrices.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.layouts: dict[int, ShardLayout] = {}
        self.paused = False
        """If True, `step` does nothing. DeepSpeed calls `step` at every ZeRO stage, so that this skips an update."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Updates all parameters that have gradients."""
        if self.paused:
            return None
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["orthogonal"]]
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["orthogonal"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._muon_step(parameter, group)
        return loss

    def _muon_step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
            state["step"] = torch.tensor(0.0)  # torch's AdamW expects one in every state it loads
        state["step"] += 1
        buffer, gradient = state["momentum_buffer"], parameter.grad
        assert gradient is not None
        buffer.lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(buffer, group["momentum"])  # Nesterov
        layout = self.layouts.get(id(parameter))
        steps = group["newton_schulz_steps"]
        update = direction(update, steps) if layout is None else _sharded_direction(update, layout, steps)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"])


def direction(matrix: Tensor, steps: int) -> Tensor:
    """Muon's update: the orthogonalized matrix times sqrt(max(1, rows / columns)). Raises ValueError for others."""
    if matrix.dim() != 2:
        raise ValueError(f"Muon needs matrices, got shape {tuple(matrix.shape)}; give others to AdamW")
    rows, columns = matrix.shape
    return orthogonalize(matrix, steps) * max(1.0, rows / columns) ** 0.5


def orthogonalize(matrix: Tensor, steps: int) -> Tensor:
    """Newton-Schulz iteration: moves singular values to about 1 (0.7 to 1.2 after 5 steps), keeps singular vectors.

    The coefficients of the quintic polynomial have the steepest slope at 0 that converges to this range. It computes in
    bfloat16 on a GPU, where the iteration is known to be stable, and in float32 elsewhere.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.to(torch.bfloat16) if matrix.is_cuda else matrix.float()
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.mT
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrix.dtype)


def _sharded_direction(update: Tensor, layout: ShardLayout, steps: int) -> Tensor:
    """`direction` for a flat partition: gathers all, computes on whole matrices, and returns this rank's part."""
    whole_WS = gather(update, layout.group, layout.world)
    result = torch.zeros_like(update)
    for slot in layout.slots:
        if layout.cut_each:
            _cut_matrix(whole_WS, slot, layout.rank, steps, result)
        else:
            _packed_matrix(whole_WS.view(-1), slot, layout, steps, result)
    return result


def gather(piece: Tensor, group: Any, world: int) -> Tensor:
    """The tensors of all ranks, stacked."""
    if world == 1:
        return piece[None]
    pieces = [torch.empty_like(piece) for _ in range(world)]
    dist.all_gather(pieces, piece, group=group)
    return torch.stack(pieces)


def _cut_matrix(whole_WS: Tensor, slot: MatrixSlot, rank: int, steps: int, result: Tensor) -> None:
    rows, columns = slot.shape
    pieces_WL = whole_WS[:, slot.offset : slot.offset + slot.length]
    moved = direction(pieces_WL.reshape(-1)[: rows * columns].view(rows, columns), steps).reshape(-1)
    mine = moved[rank * slot.length : (rank + 1) * slot.length]
    result[slot.offset : slot.offset + mine.numel()] = mine


def _packed_matrix(flat: Tensor, slot: MatrixSlot, layout: ShardLayout, steps: int, result: Tensor) -> None:
    start, end = layout.rank * layout.numel, (layout.rank + 1) * layout.numel
    first, last = max(slot.offset, start), min(slot.offset + slot.length, end)
    if first >= last:
        return
    matrix = flat[slot.offset : slot.offset + slot.length].view(slot.shape)
    moved = direction(matrix, steps).reshape(-1)
    result[first - start : last - start] = moved[first - slot.offset : last - slot.offset]
