"""Memory of batched states that is taken page by page, as it is written, and given back row by row.

On Linux an anonymous mapping takes no memory until it is written to, and `madvise(MADV_DONTNEED)` gives pages back,
which then read as zeros: rows of the longest context cost what their sequences fill, and to empty one copies and
zeroes nothing. Huge pages are off, since one number would take 2 MiB. What a row of so many tokens takes is known in
pages, as an integer, before it is taken.
"""

import ctypes
import mmap
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd, lcm, prod

import torch
from torch import Tensor

from attnzoo.models import DecoderLM
from attnzoo.models.decoder_lm import DecoderState

PAGE = mmap.PAGESIZE
NO_RESERVE = 0x4000 if platform.machine() in ("x86_64", "aarch64") else 0
"""MAP_NORESERVE, which Python does not name: a mapping may be larger than memory."""


class Arena:
    """One mapping of zeros. Raises OSError where the system refuses a mapping of so many bytes, or has no `madvise`."""

    def __init__(self, nbytes: int) -> None:
        if not hasattr(mmap, "MADV_DONTNEED") or platform.system() != "Linux":
            raise OSError(f"{platform.system()} gives back no single pages of a mapping")
        self._map = mmap.mmap(-1, max(nbytes, PAGE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
        # A forked child would share the pages, and a core dump hold them.
        for name in ("MADV_NOHUGEPAGE", "MADV_DONTFORK", "MADV_DONTDUMP"):
            if hasattr(mmap, name):
                self._map.madvise(getattr(mmap, name))
        self._end = 0

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The next tensor in the mapping, from the beginning of a page on. It keeps the mapping alive."""
        count, start = prod(shape), self._end
        self._end = start + pages(count * dtype.itemsize)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start).view(*shape)

    def release(self, start: int, end: int) -> None:
        """Gives back the whole pages of the mapping between two of its bytes, which then read as zeros."""
        first, last = pages(start), end // PAGE * PAGE
        if first < last:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def offset(self, x: Tensor) -> int:
        """The byte of the mapping at which a tensor of `zeros` begins."""
        return x.data_ptr() - ctypes.addressof(ctypes.c_char.from_buffer(self._map))


def pages(nbytes: int) -> int:
    """`nbytes` rounded up to whole pages."""
    return -(-nbytes // PAGE) * PAGE


@lru_cache(maxsize=1)
def _trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def give_back_freed() -> None:
    """Gives memory that is free in the heap back to the system, where the C library (glibc) can. It would keep as much
    as was ever in use."""
    trim = _trim()
    if trim is not None:
        trim(0)


@dataclass(frozen=True)
class _Leaf:
    """A tensor of a state in the arena: each row is `regions` regions of `span` bytes, of which a sequence fills `step`
    for every token; step 0: it fills all of them. start: of the first row in the mapping."""

    start: int
    regions: int
    span: int
    step: int

    def filled(self, tokens: int) -> int:
        """Bytes of the pages of a region that so many tokens fill."""
        return self.span if self.step == 0 and tokens else min(self.span, pages(self.step * tokens))


class ElasticState:
    """The batched exact state of a model, with room for `tokens` tokens in each of `rows` rows. state: the state.

    Raises OSError where the system refuses; `DecoderLM.init_state` then makes a state that takes all its memory.
    """

    def __init__(self, model: DecoderLM, rows: int, tokens: int) -> None:
        slots = _whole_pages(model, tokens)
        one, two = (model.init_state(1, n, device="meta").tensors() for n in (slots, 2 * slots))
        shapes = model.init_state(rows, slots, device="meta")
        # A row that shares its pages with others cannot be given back, and is emptied by hand.
        paged = {name for name, x in one.items() if x.nbytes and x.nbytes % PAGE == 0}
        self._arena = Arena(sum(pages(x.nbytes) for name, x in shapes.tensors().items() if name in paged))
        self._leaves: list[_Leaf] = []
        self._small: list[Tensor] = []

        def made(name: str, like: Tensor) -> Tensor:
            if name not in paged:
                self._small.append(torch.zeros(like.shape, dtype=like.dtype))
                return self._small[-1]
            x = self._arena.zeros(like.shape, like.dtype)
            self._leaves.append(_leaf(self._arena.offset(x), one[name], two[name]))
            return x

        self.state: DecoderState = shapes.map(made)
        self.always = sum(x.nbytes for x in self._small)
        """Bytes that are taken whatever the rows hold."""

    def nbytes(self, tokens: int) -> int:
        """Bytes of the pages that a row of so many tokens takes."""
        return sum(leaf.regions * leaf.filled(tokens) for leaf in self._leaves) if tokens else 0

    def release(self, row: int, tokens: int = 0) -> None:
        """Gives back what a row holds behind its first `tokens` tokens, in whole pages; 0: empties it."""
        for leaf in self._leaves:
            size = leaf.regions * leaf.span
            start = leaf.start + row * size
            if not tokens:
                self._arena.release(start, start + size)
                continue
            for region in range(start, start + size, leaf.span):
                self._arena.release(region + leaf.filled(tokens), region + leaf.span)
        for x in self._small if not tokens else ():
            x[row].zero_()


def _whole_pages(model: DecoderLM, tokens: int) -> int:
    """At least `tokens` tokens, so many that what a head keeps of them is whole pages."""
    one, two = (model.init_state(1, n, device="meta").tensors() for n in (tokens, 2 * tokens))
    steps = [_leaf(0, one[name], two[name]).step for name in one]
    least = lcm(*(PAGE // gcd(PAGE, step) for step in steps if step))
    return -(-tokens // least) * least


def _leaf(start: int, one: Tensor, two: Tensor) -> _Leaf:
    """`_Leaf` of a tensor, from a row of it with room for some tokens, and with room for twice as many."""
    axis = next((axis for axis in range(1, one.dim()) if one.shape[axis] != two.shape[axis]), None)
    if axis is None:
        return _Leaf(start, 1, one.nbytes, 0)
    step = prod(one.shape[axis + 1 :]) * one.element_size()
    return _Leaf(start, prod(one.shape[1:axis]), one.shape[axis] * step, step)
