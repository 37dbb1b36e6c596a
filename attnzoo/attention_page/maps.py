"""Reads the attention weights that a page shows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.attention.edits import EditRun, Edits, LayerSizes, Map, TokenLayout, Where, layer_sizes
from attnzoo.attention.edits.spans import ALL, Picks, normal_picks, picked
from attnzoo.attention_page.encoding import Token, page_bytes, tokens_of
from attnzoo.language_model import LanguageModel

MAX_TOKENS = 256
"""Tokens of a text, unless the user allows more."""
MOST_TOKENS = 2048
"""Tokens that can be allowed: a map of more has no cell that can be pointed at."""
MAX_PAGE_BYTES = 128 << 20
"""Larger pages make browsers slow, or do not open."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a page shows. layers, heads: "all", a number, "4:8" (from 4, before 8), or a list of these; numbers below 0
    count from the end. max_tokens: the most tokens that the text may have."""

    layers: Picks = ALL
    heads: Picks = ALL
    max_tokens: int = MAX_TOKENS

    def __post_init__(self) -> None:
        for name in ("layers", "heads"):
            object.__setattr__(self, name, normal_picks(getattr(self, name), name))
        if type(self.max_tokens) is not int or not 1 <= self.max_tokens <= MOST_TOKENS:
            raise ValueError(f"max_tokens={self.max_tokens!r} must be a whole number from 1 to {MOST_TOKENS}")


@dataclass(frozen=True)
class HeadMaps:
    """The weights [heads, queries, keys] of some heads of one layer. variant: the layer's class of attention."""

    layer: int
    variant: str
    heads: tuple[int, ...]
    weights_NTT: Tensor


@dataclass(frozen=True)
class ModelMaps:
    """The weights of a model for a text. num_layers: of the model; notes: what is not shown, and why."""

    model: str
    num_layers: int
    tokens: tuple[Token, ...]
    layers: tuple[HeadMaps, ...]
    notes: tuple[str, ...]


def select(sizes: Sequence[LayerSizes], selection: Selection) -> tuple[dict[int, tuple[int, ...]], tuple[str, ...]]:
    """(heads of every layer that is shown, what is left out and why). A layer whose attention has no weights is left
    out where all are meant. Raises ValueError where it is named, none is left, or a number is out of range."""
    chosen: dict[int, tuple[int, ...]] = {}
    refused: dict[int, str] = {}
    for layer in picked(selection.layers, len(sizes), "layers"):
        size = sizes[layer]
        if size.editing.reads:
            chosen[layer] = picked(selection.heads, size.num_heads, f"layer {layer}: heads")
        else:
            refused[layer] = f"layer {layer} ({size.variant}) has no attention weights: {size.editing.why_not}"
    if refused and (selection.layers != ALL or not chosen):
        first = next(iter(refused.values()))
        raise ValueError(f"layers={shown(selection.layers)}: {first}; {_way_out(sizes)}")
    return chosen, tuple(f"{reason}; it is left out" for reason in refused.values())


def _way_out(sizes: Sequence[LayerSizes]) -> str:
    able = [layer for layer, size in enumerate(sizes) if size.editing.reads]
    return f"layers that have: {shown(tuple(able))}" if able else "no layer of this model has; choose another model"


def shown(picks: Picks) -> str:
    """Picks as the user writes them."""
    if isinstance(picks, tuple):
        return str(picks[0]) if len(picks) == 1 else f"[{', '.join(map(str, picks))}]"
    return str(picks)


def check_maps(lm: LanguageModel, text: str, selection: Selection) -> None:
    """Raises the ValueError of `read_maps` for a text and numbers that it would refuse before it computes."""
    _wanted(lm, text, selection)


@torch.no_grad()
def read_maps(lm: LanguageModel, text: str, selection: Selection) -> ModelMaps:
    """The weights of a model for a text, read in one pass of the parallel form, and so without a compressed cache.

    Raises ValueError for a text that is empty or too long, a page that would be too large, numbers out of range, layers
    without weights, and weights that float16 cannot hold.
    """
    sizes, chosen, notes, ids = _wanted(lm, text, selection)
    reads = Edits(
        *(
            Map(Where(layers=layer, heads=list(heads)), dtype="fp16" if sizes[layer].editing.bounded else "fp32")
            for layer, heads in chosen.items()
        )
    )
    returned = sum(4 * len(heads) * len(ids) ** 2 for heads in chosen.values())
    plan = lm.model.plan_edits(reads, TokenLayout(len(ids)), max_bytes=returned, streams=False)
    run = EditRun(plan)
    lm.model.hidden(torch.tensor([ids], device=lm.device), edits=[run])
    reading = run.reading
    found = tuple(
        HeadMaps(layer, sizes[layer].variant, heads, reading[layer].map.half().cpu()) for layer, heads in chosen.items()
    )
    for each in found:
        if not torch.isfinite(each.weights_NTT).all():
            raise ValueError(
                f"layer {each.layer} ({each.variant}) has weights that are no numbers, or too large for float16 (above "
                "65,504); leave it out of layers="
            )
    return ModelMaps(lm.name, len(sizes), tokens_of(lm.tokenizer, ids), found, notes)


def _wanted(
    lm: LanguageModel, text: str, selection: Selection
) -> tuple[list[LayerSizes], dict[int, tuple[int, ...]], tuple[str, ...], list[int]]:
    """(sizes of all layers, what `select` returns, tokens of the text)."""
    if not text:
        raise ValueError("the text is empty; give at least one character")
    sizes = [layer_sizes(block.attention) for block in lm.model.layers()]
    chosen, notes = select(sizes, selection)
    ids = lm.encode(text)
    _check_size(lm, len(ids), chosen, selection)
    return sizes, chosen, notes, ids


def _check_size(lm: LanguageModel, tokens: int, chosen: dict[int, tuple[int, ...]], selection: Selection) -> None:
    heads = sum(map(len, chosen.values()))
    size = page_bytes(heads, tokens)
    taken = (
        f"the text has {tokens:,} tokens, and a page of {len(chosen)} layers with {heads} heads {size / 1e6:,.1f} MB"
    )
    if tokens > lm.config.max_positions:
        raise ValueError(
            f"the text has {tokens:,} tokens, and the model's context {lm.config.max_positions:,}; shorten it"
        )
    if tokens > selection.max_tokens:
        more = f", or set max_tokens={tokens}" if tokens <= MOST_TOKENS and size <= MAX_PAGE_BYTES else ""
        raise ValueError(f"{taken}; max_tokens={selection.max_tokens}: shorten the text{more}")
    if size > MAX_PAGE_BYTES:
        raise ValueError(
            f"{taken}; the most is {MAX_PAGE_BYTES / 1e6:,.1f} MB: name fewer layers= or heads=, or shorten the text"
        )
