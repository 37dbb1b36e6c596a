"""Memory of serving: the state of a sequence under each cache, and how many sequences fit beside the weights."""

from collections.abc import Sequence
from typing import Any

from attnzoo.kvcache import FullCache, build_cache
from attnzoo.models import DecoderLM
from attnzoo.planner.chips import Chip
from attnzoo.report import format_table
from attnzoo.settings import parse_words

MIB, GIB = 2**20, 2**30


def exact_caches(model: DecoderLM, context: int) -> dict[str, int]:
    """Bytes of the state of one sequence of `context` tokens: with the cache that the model's layers are configured
    with, and with the full cache if that differs."""
    configured = model.cost(1, 1, context).state_bytes
    dtype = model.embedding.weight.dtype
    full = configured
    layers = [layer for block in model.layers() for layer in block.attention.kv_layers()]
    window = any(not isinstance(layer.exact, FullCache) for layer in layers)
    for layer in layers:
        size = layer.size(1, dtype)
        full += FullCache().nbytes(size, context) - layer.exact.nbytes(size, context)
    if not layers:
        constant = all(block.attention.traits.growth == "O(1)" for block in model.layers())
        return {"constant state" if constant else "state of its own": configured}
    return {"full": full, "window": configured} if window else {"full": configured}


def cache_bytes(model: DecoderLM, context: int, compressed: Sequence[str]) -> dict[str, int]:
    """`exact_caches`, and the bytes of a sequence of `context` tokens once each of the named caches has compressed it.

    compressed: such as "d2o keep_ratio=0.5". Raises ValueError for an unknown cache or option, and where the model's
    layers cannot keep it."""
    found = exact_caches(model, context)
    for words in compressed:
        name, *options = words.split() or [""]
        policy = build_cache(name, parse_words(options, "keep_ratio=0.5"))
        found[words] = model.byte_model(policy).compressed(context, 0)
    return found


def serving_report(
    model: DecoderLM, states: dict[str, int], context: int, memory: int, precision: str, chips: list[Chip]
) -> str:
    """A table of the sequences of `context` tokens that fit in `memory` bytes of one GPU with each cache, and of the
    shortest time of a decode step on each chip. states: bytes of a sequence by cache."""
    weights = model.num_parameters() * model.embedding.weight.element_size()
    rows = []
    for policy, state in states.items():
        # Beside the state, a sequence needs logits in float32 and a few vectors of the residual stream.
        row_bytes = state + 4 * model.config.vocab_size + 8 * 4 * model.config.model_dim
        count = max((memory - weights) // row_bytes, 0)
        row: dict[str, Any] = {
            "cache": policy,
            "MiB a sequence": round(state / MIB, 3),
            "weights GiB": round(weights / GIB, 3),
            "sequences a GPU": count,
        }
        for chip in chips:
            if count == 0:
                row[f"{chip.name} ms a step"] = "none fits"
                continue
            flops = count * model.cost(1, 1, context).flops
            seconds = max((weights + count * state) / chip.bandwidth, flops / chip.flops(precision))
            row[f"{chip.name} ms a step"] = seconds * 1e3
        rows.append(row)
    title = f"Serving sequences of {context:,} tokens in {torch_name(model)}; shortest time of a decode step"
    return (
        f"{title}\n{format_table(rows)}\na step gives every sequence one token and reads the weights and each state "
        "once (a model, not a measurement)"
    )


def torch_name(model: DecoderLM) -> str:
    """The name of the dtype of weights and state, for example "bfloat16"."""
    return str(model.embedding.weight.dtype).removeprefix("torch.")
