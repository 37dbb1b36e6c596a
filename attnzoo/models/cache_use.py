"""What a cache kept of a finished sequence and how many bytes it took, in one definition for all caches.

Bytes are those that the sequence's own tokens fill: keys, values, positions, accumulated attention, channel indices,
observed queries, rings, and other state of the layers. Reserved room is not counted: slots after the last token of a
full cache, the rest of a page in a compressed one, and slots that only a longer sequence of the batch fills.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from attnzoo.kvcache import CACHES, CachePolicy
from attnzoo.kvcache.base import caches_of
from attnzoo.kvcache.choice import FULL

if TYPE_CHECKING:
    from attnzoo.models.decoder_lm import DecoderLM


@dataclass(frozen=True)
class CacheUse:
    """What a cache did for one sequence.

    policy: the name of the cache policy. kept_tokens: number of tokens whose keys and values are stored at the end,
    averaged over the layers that store any. kv_bytes, kv_bytes_full: bytes of the state in this cache, and in the full
    one. not_compressed: why a compressing policy left out nothing or takes more than the full cache, or None.
    """

    policy: str
    kept_tokens: int
    kv_bytes: int
    kv_bytes_full: int
    not_compressed: str | None = None


def exact_use(model: "DecoderLM", context: int, kv_bytes: int) -> CacheUse:
    """Use of the model's own caches. kv_bytes: bytes of a state of `context` tokens."""
    kept = []
    for block in model.layers():
        layers = block.attention.kv_layers()
        kept += [layer.exact.kept(context) for layer in layers]
        if not layers and block.attention.traits.growth != "O(1)":
            kept.append(context)
    return CacheUse(FULL, _mean(kept), kv_bytes, kv_bytes)


def compressed_use(policy: CachePolicy, layers: Sequence[Any], row: int, prompt: int, full: CacheUse) -> CacheUse:
    """Use of sequence `row` in the layers' states. prompt: its prompt's tokens. full: use of the full cache."""
    kv_bytes, kept, context, thinned = 0, [], 0, False
    for layer in layers:
        kv_bytes += layer.rows(slice(row, row + 1)).nbytes()
        for cache in caches_of(layer):
            context = int(layer.lengths_B[row])
            there = cache.occupied(row, context)
            kv_bytes += there.nbytes - cache.rows(slice(row, row + 1)).nbytes()
            kept.append(there.tokens)
            thinned = thinned or there.thinned
    found = CacheUse(policy_name(policy), _mean(kept), kv_bytes, full.kv_bytes)
    reasons = []
    if not thinned and min(kept) == context:
        reasons.append(policy.why_whole(prompt, context))
    if kv_bytes > full.kv_bytes:
        reasons.append(
            f"what it stores besides keys and values is more than it saves at {context} tokens: {kv_bytes} bytes, and "
            f"{full.kv_bytes} in the full cache"
        )
    return replace(found, not_compressed="; ".join(reasons)) if reasons else found


def policy_name(policy: CachePolicy) -> str:
    """The name under which a policy is registered; its class's name where it is not."""
    return next((name for name in CACHES if CACHES.get(name) is type(policy)), type(policy).__name__)


def _mean(counts: Sequence[int]) -> int:
    return round(sum(counts) / len(counts)) if counts else 0
