"""Buffers that are saved, such as running means: one value for all ranks, as checkpoint and export hold only one."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class SavedBuffers:
    """The buffers in a module's `state_dict`. What forward passes write there differs from rank to rank with the data,
    until `share` gives every rank the values of rank 0."""

    def __init__(self, module: nn.Module) -> None:
        saved = module.state_dict(keep_vars=True).keys()
        names = [name for name, _ in module.named_buffers(remove_duplicate=False) if name in saved]
        paths = [(name, *name.rpartition(".")[::2]) for name in names]
        self._places = [(name, module.get_submodule(owner), leaf) for name, owner, leaf in paths]

    def items(self) -> list[tuple[str, Tensor]]:
        """By name, as they are now: a module may replace a buffer instead of writing into it."""
        return [(name, owner.get_buffer(leaf)) for name, owner, leaf in self._places]

    @torch.no_grad()
    def share(self) -> None:
        """Rank 0's values on every rank, by one broadcast of bytes; every rank calls it."""
        buffers = [buffer for _, buffer in self.items()]
        if not buffers or dist.get_world_size() == 1:
            return
        whole = torch.cat([buffer.reshape(-1).view(torch.uint8) for buffer in buffers])
        dist.broadcast(whole, 0)
        for buffer, part in zip(buffers, whole.split([buffer.nbytes for buffer in buffers]), strict=True):
            buffer.copy_(part.clone().view(buffer.dtype).view(buffer.shape))  # a copy lies where its dtype asks for
