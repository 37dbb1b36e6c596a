"""Finds the matrices that Muon needs whole in ZeRO's partitions, from the attributes of DeepSpeed's optimizers."""

from typing import Any

import torch.distributed as dist

from train.optim import MatrixAdamW, MatrixSlot, ShardLayout


def layouts(wrapper: Any, stage: int, optimizer: MatrixAdamW) -> dict[int, ShardLayout]:
    """The layouts of Muon's matrices, by id of the flat parameter; empty at stage 0, which keeps matrices whole.
    wrapper: DeepSpeed's ZeRO optimizer around `optimizer`."""
    if stage == 0:
        return {}
    return _packed_layouts(wrapper, optimizer) if stage < 3 else _cut_layouts(wrapper, optimizer)


def _packed_layouts(wrapper: Any, optimizer: MatrixAdamW) -> dict[int, ShardLayout]:
    layouts = {}
    for i, group in enumerate(optimizer.param_groups):
        if not group["orthogonal"]:
            continue
        matrices, offsets = wrapper.round_robin_bit16_groups[i], wrapper.round_robin_bit16_offsets[i]
        process_group = wrapper.real_dp_process_group[i]
        layouts[id(wrapper.single_partition_of_fp32_groups[i])] = ShardLayout(
            slots=tuple(
                MatrixSlot((p.shape[0], p.shape[1]), offset, p.numel())
                for p, offset in zip(matrices, offsets, strict=True)
            ),
            numel=wrapper.partition_size[i],
            rank=dist.get_rank(process_group),
            world=dist.get_world_size(process_group),
            group=process_group,
            cut_each=False,
        )
    return layouts


def _cut_layouts(wrapper: Any, optimizer: MatrixAdamW) -> dict[int, ShardLayout]:
    layouts = {}
    for i, matrices in enumerate(wrapper.fp16_groups):
        if not optimizer.param_groups[wrapper.sub_group_to_group_id[i]]["orthogonal"]:
            continue
        slots, offset = [], 0
        for parameter in matrices:
            length = parameter.partition_numel()
            slots.append(MatrixSlot((parameter.ds_shape[0], parameter.ds_shape[1]), offset, length))
            offset += length
        process_group = wrapper.sub_group_process_groups[i]
        layouts[id(wrapper.fp32_partitioned_groups_flat[i])] = ShardLayout(
            slots=tuple(slots),
            numel=offset,
            rank=dist.get_rank(process_group),
            world=dist.get_world_size(process_group),
            group=process_group,
            cut_each=True,
        )
    return layouts
