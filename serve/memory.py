"""What a finished request's state took, for its client: on one definition, whatever its cache.

Bytes are those that the request's own tokens fill, as the tensors hold them: keys, values, positions, masses, channel
indices, observed queries, rings, and what layers carry besides. Room that is only reserved is not counted: of the full
cache the slots after the last token, of a compressed one the rest of a page and what a longer neighbour's row needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from attnzoo.kvcache import CachePolicy, WindowCache
from attnzoo.kvcache.compressed import CompressedState, occupied

if TYPE_CHECKING:
    from attnzoo.models import DecoderLM


@dataclass(frozen=True)
class Memory:
    """kept_tokens: whose keys and values are there at the end, the mean over the layers that have any. kv_bytes,
    kv_bytes_full: by the request's cache, and by the full one. not_compressed: why a policy that compresses left
    everything as it was, or takes more than the full cache; None where it did neither, and where nobody asked."""

    kept_tokens: int
    kv_bytes: int
    kv_bytes_full: int
    not_compressed: str | None = None


def exact_memory(model: "DecoderLM", context: int, kv_bytes: int) -> Memory:
    """Of the model's own caches. kv_bytes: of a state of `context` tokens."""
    kept = []
    for block in model.layers():
        cache = getattr(getattr(block.attention, "mixing", None), "cache", None)
        if isinstance(cache, WindowCache):
            kept.append(min(context, cache.window + cache.sinks))
        elif block.attention.traits.growth != "O(1)":
            kept.append(context)
    return Memory(_mean(kept), kv_bytes, kv_bytes)


def compressed_memory(policy: CachePolicy, layers: Sequence[Any], row: int, prompt: int, full: Memory) -> Memory:
    """Of one row of a state that `policy` keeps. full: what the full cache would take."""
    kv_bytes, kept, context, thinned = 0, [], 0, False
    for layer in layers:
        cached = getattr(layer, "mixing", None)
        if not isinstance(cached, CompressedState):
            kv_bytes += layer.rows(slice(row, row + 1)).nbytes()
            continue
        context = int(layer.lengths_B[row])
        there = occupied(cached, row, context)
        kv_bytes += layer.rows(slice(row, row + 1)).nbytes() - cached.rows(slice(row, row + 1)).nbytes() + there.nbytes
        kept.append(there.tokens)
        thinned = thinned or there.thinned
    found = Memory(_mean(kept), kv_bytes, full.kv_bytes)
    reasons = []
    if not thinned and min(kept) == context:
        reasons.append(policy.why_whole(prompt, context))
    if kv_bytes > full.kv_bytes:
        reasons.append(
            f"what it stores besides keys and values is more than it saves at {context} tokens: {kv_bytes} bytes, and "
            f"{full.kv_bytes} in the full cache"
        )
    return replace(found, not_compressed="; ".join(reasons)) if reasons else found


def _mean(counts: Sequence[int]) -> int:
    return round(sum(counts) / len(counts)) if counts else 0
