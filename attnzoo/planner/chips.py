"""Peak compute, memory and bandwidth of common GPUs from their data sheets, and of this machine's CPU as measured."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

from attnzoo.errors import suggest

CPU = "cpu"
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A chip's peak numbers. bf16_flops, fp32_flops: dense FLOP/s. bandwidth: bytes/s of memory. memory: bytes (a data
    sheet's GB is 2^30 bytes). link: bytes/s that one chip sends to others in its node; network: bytes/s that it sends
    to other nodes.
    """

    name: str
    bf16_flops: float
    fp32_flops: float
    bandwidth: float
    memory: float
    link: float
    network: float
    source: str

    def flops(self, precision: str) -> float:
        """Peak FLOP/s of matrix products, for "bf16" or "fp32"."""
        return self.bf16_flops if precision == "bf16" else self.fp32_flops


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="H100",
            bf16_flops=989e12,
            fp32_flops=67e12,
            bandwidth=3.35e12,
            memory=80 * GIB,
            link=450e9,
            network=50e9,
            source="NVIDIA H100 data sheet, SXM; NVLink 4, one 400 Gb/s port a GPU",
        ),
        Chip(
            name="H100 PCIe",
            bf16_flops=756e12,
            fp32_flops=51e12,
            bandwidth=2.0e12,
            memory=80 * GIB,
            link=300e9,
            network=50e9,
            source="NVIDIA H100 data sheet, PCIe; NVLink bridge between two, one 400 Gb/s port a GPU",
        ),
        Chip(
            name="H200",
            bf16_flops=989e12,
            fp32_flops=67e12,
            bandwidth=4.8e12,
            memory=141 * GIB,
            link=450e9,
            network=50e9,
            source="NVIDIA H200 data sheet, SXM; NVLink 4, one 400 Gb/s port a GPU",
        ),
        Chip(
            name="A100",
            bf16_flops=312e12,
            fp32_flops=19.5e12,
            bandwidth=2.039e12,
            memory=80 * GIB,
            link=300e9,
            network=25e9,
            source="NVIDIA A100 80GB data sheet, SXM; NVLink 3, one 200 Gb/s port a GPU",
        ),
        Chip(
            name="B200",
            bf16_flops=2250e12,
            fp32_flops=75e12,
            bandwidth=8.0e12,
            memory=180 * GIB,
            link=900e9,
            network=50e9,
            source="NVIDIA HGX B200 data sheet; NVLink 5, one 400 Gb/s port a GPU",
        ),
        Chip(
            name="L40S",
            bf16_flops=362e12,
            fp32_flops=91.6e12,
            bandwidth=864e9,
            memory=48 * GIB,
            link=32e9,
            network=25e9,
            source="NVIDIA L40S data sheet; PCIe 4 x16, one 200 Gb/s port a GPU",
        ),
        Chip(
            name="MI300X",
            bf16_flops=1307e12,
            fp32_flops=163.4e12,
            bandwidth=5.3e12,
            memory=192 * GIB,
            link=448e9,
            network=50e9,
            source="AMD Instinct MI300X data sheet; 7 Infinity Fabric links, one 400 Gb/s port a GPU",
        ),
    )
}


def chip_of(device: str) -> Chip | None:
    """The chip that a device's name contains, such as "NVIDIA H100 80GB HBM3"; None if `CHIPS` has none of them."""
    names = sorted(CHIPS, key=len, reverse=True)  # "H100 PCIe" contains "H100"
    return next((CHIPS[name] for name in names if name in device), None)


def chosen_chips(names: list[str] | None) -> list[Chip]:
    """The chips with these names, in any case (None: all, this CPU last). Raises ValueError that lists known names."""
    known = {name.lower(): name for name in (*CHIPS, CPU)}
    chips = []
    for name in known.values() if names is None else names:
        if name.lower() not in known:
            raise ValueError(f"--chip: unknown chip {name!r}{suggest(name, known.values())}")
        key = known[name.lower()]
        chips.append(this_cpu() if key == CPU else CHIPS[key])
    return chips


@functools.cache
def this_cpu() -> Chip:
    """This machine's CPU, measured for about a second and once a process, with products of 2048 x 2048 matrices in both
    precisions and with reading 256 MiB. Ranks communicate through memory, so that link and network are half of its
    bandwidth."""
    import torch

    size = 2048
    flops = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = (torch.ones(size, size, dtype=dtype) for _ in range(2))
        flops[dtype] = 2 * size**3 / _seconds(lambda left=left, right=right: left @ right)  # type: ignore[misc]
    row = torch.ones(64 << 20)
    bandwidth = row.nbytes / _seconds(row.sum)
    return Chip(
        name=CPU,
        bf16_flops=flops[torch.bfloat16],
        fp32_flops=flops[torch.float32],
        bandwidth=bandwidth,
        memory=_machine_memory(),
        link=bandwidth / 2,
        network=bandwidth / 2,
        source=f"measured here with {torch.get_num_threads()} threads",
    )


def _seconds(call: Callable[[], object]) -> float:
    """Seconds of a call, the shortest of three."""
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def _machine_memory() -> float:
    import os

    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
