"""Random lists of edits, and a layout in which all of them mean something."""

import random

import torch

from attnzoo.attention.edits import (
    Add,
    CopyHead,
    Except,
    HeadFilter,
    Hide,
    LayerSizes,
    Move,
    PutScores,
    PutWeights,
    Raise,
    Scale,
    Sinks,
    Span,
    Temper,
    TokenLayout,
    Where,
)

HEADS, TOKENS = 4, 11
LAYOUT = TokenLayout(7, {"image": (1, 4), "text": [(4, 6), (0, 1)]})
SINKS = Sinks((2,), 1.4)
PLANNED = TokenLayout(10, {"image": (2, 6), "system": [(0, 2), (8, 9)]})
SOFTMAX = LayerSizes(num_heads=4, num_kv_heads=2, head_dim=8, variant="mha", model_dim=32)
"""For plans alone: a layout, and a layer."""


def drawn_items(draw: random.Random, dense: bool):
    """A list of edits that mean something in `LAYOUT`."""
    spans = [
        "image",
        "text",
        Span(2, 8),
        "generated",
        Span.after("image"),
        Except("text"),
        (0, Span(5, 9)),
        "all",
        SINKS,
    ]

    def where(**more):
        heads = draw.choice(["all", [0, -1], "1:3", [2]])
        queries = draw.choice(["all", Span(3, 9), "generated", -1, (0, Span(4, 10))])
        return Where(heads=heads, queries=queries, keys=more.get("keys", draw.choice(spans)))

    def values(keys, at):
        heads = {"all": HEADS, "1:3": 2}.get(at.heads, len(at.heads))
        return torch.rand(heads, 4, keys).tolist()

    light = [
        lambda: Add(where(), draw.uniform(-2, 2)),
        lambda: Hide(where()),
        lambda: Scale(where(), draw.uniform(0, 3), draw.random() < 0.5),
        lambda: Raise(where(), draw.uniform(0, 1)),
        lambda: Move(where(), draw.choice(spans), draw.uniform(0, 1)),
        lambda: Move(where(keys=SINKS), "image", 0.6, HeadFilter(of="image", min_mass=0.1, min_share=0.4)),
    ]

    def put(kind):
        at = Where(heads=draw.choice(["all", [0, -1], [2]]), queries=Span(3, 7), keys=Span(2, 6))
        return kind(at, values(4, at))

    heavy = [
        lambda: Temper(where(), draw.uniform(-1, 2), draw.random() < 0.5),
        lambda: put(PutScores),
        lambda: put(PutWeights),
        lambda: CopyHead(where(), draw.randrange(HEADS)),
    ]
    found = [draw.choice(light)() for _ in range(draw.randrange(1, 4))]
    found += [draw.choice(heavy)() for _ in range(draw.randrange(1, 3) if dense else 0)]
    draw.shuffle(found)
    return found
