"""Holds states on the device. Sequences that decode together are the rows of one batched state."""

from serve.pools.compact import AlonePool, CompactPool, compiled_step
from serve.pools.slots import HalfWrittenError, SlotPool, Verified

__all__ = ["AlonePool", "CompactPool", "HalfWrittenError", "SlotPool", "Verified", "compiled_step"]
