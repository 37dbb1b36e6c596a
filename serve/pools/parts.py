"""A sequence's state in two parts: keys and values that only ever grow, token by token, and all the rest."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from torch import Tensor

from attnzoo.kvcache.base import caches_of
from attnzoo.kvcache.compressed import CompressedState
from attnzoo.kvcache.full import FullCacheState
from attnzoo.kvcache.state import axes
from attnzoo.models.decoder_lm import DecoderState

Copied = Callable[[DecoderState, int, int], DecoderState]
"""The state of one sequence of so many tokens, continued to so many, in place where its tensors are as large."""

Seen = Callable[[str, int, Tensor], None]
"""Called with the request of a prompt that is read, where a part of it begins, and hidden_TD of the part's tokens."""


def keys_values(state: DecoderState) -> list[Tensor]:
    """Keys, then values, [B, K, S, H], of each cache in which slot s holds the token of position s."""
    return [x for whole in _wholes(state) for x in (whole.keys_BKSH, whole.values_BKSH)]


def _wholes(state: DecoderState) -> Iterator[FullCacheState]:
    for cache in caches_of(state.layers):
        whole = cache.tail if isinstance(cache, CompressedState) else cache
        if isinstance(whole, FullCacheState):
            yield whole


def others(state: DecoderState) -> dict[str, Tensor]:
    """All tensors but `keys_values`, by name."""
    whole = {id(x) for x in keys_values(state)}
    return {name: x for name, x in state.tensors().items() if id(x) not in whole}


def cell_of(state: DecoderState, start: int, end: int) -> list[Tensor]:
    """Copies of the keys and values of the tokens from `start` to `end` of a state of one sequence."""
    return [x[:, :, start:end].clone() for x in keys_values(state)]


def rest_of(state: DecoderState, tokens: int, names: Collection[str]) -> dict[str, Tensor]:
    """Views of other tensors of a state of one sequence of so many tokens."""
    return {name: _cut(name, x, tokens) for name, x in others(state).items() if name in names}


def restored(
    state: DecoderState, cells: Sequence[Sequence[Tensor]], rest: Mapping[str, Tensor], start: int, tokens: int
) -> DecoderState:
    """A state of one sequence of `start` tokens, continued to `tokens` by what `cell_of` and `rest_of` have taken of
    another; in place, but for tensors of another shape."""
    for cell in cells:
        for x, part in zip(keys_values(state), cell, strict=True):
            x[:, :, start : start + part.shape[2]] = part
        start += cell[0].shape[2] if cell else 0

    def filled(name: str, x: Tensor) -> Tensor:
        part = rest.get(name)
        if part is None:
            return x
        here = _cut(name, x, tokens)
        if here.shape != part.shape:  # as many queries as a policy has observed
            return part.clone()
        here.copy_(part)
        return x

    return state.map(filled)


def _cut(name: str, x: Tensor, tokens: int) -> Tensor:
    """What a tensor with an entry for every token holds of so many; others whole."""
    axis = axes(name).find("S")
    return x if axis < 0 else x.narrow(axis, 0, min(tokens, x.shape[axis]))
