"""The bytes and FLOPs that an operation needs in any implementation."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class OpCost:
    """bytes_read, bytes_written: bytes that must pass between memory and processor even if all else stays on chip:
    every input and result once. flops: of matrix products and weighted sums of rows, a multiply and an add counted as
    two; without elementwise operations and without results that an implementation discards."""

    bytes_read: int
    bytes_written: int
    flops: int

    @property
    def bytes_moved(self) -> int:
        return self.bytes_read + self.bytes_written

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes_moved
