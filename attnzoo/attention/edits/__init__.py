"""Reads and edits of attention: what is wanted, said before anything is computed, and exact in every form.

`Edits(...)` lists reads and edits; `.plan(...)` checks them against a model and a `TokenLayout` and says what they
cost; an `EditRun` of the plan goes with a sequence through the model, and its `.reading` has what was read. The order
of things is in `order.py`.

>>> edits = Edits(Scale(Where(keys="image"), factor=1.5), Mass(Where(layers=-1), bins={"image": "image"}))
>>> Edits.from_json(edits.to_json()) == edits
True
"""

from attnzoo.attention.edits.cost import EditCost, LayerCost
from attnzoo.attention.edits.items import (
    Add,
    CopyHead,
    Edit,
    HeadFilter,
    Hide,
    Item,
    Move,
    PutScores,
    PutWeights,
    Raise,
    Scale,
    Temper,
    Values,
    Where,
)
from attnzoo.attention.edits.plan import EditPlan, Edits
from attnzoo.attention.edits.reading import LayerReading, Reading, ReadResult
from attnzoo.attention.edits.reads import Entropy, KeySums, Map, Mass, Read, TopKeys
from attnzoo.attention.edits.run import EditRun, EditRuns, LayerPlan, check_rows, check_runs, layer_plan, layer_plans
from attnzoo.attention.edits.spans import ALL, GENERATED, After, Except, Sinks, Span, TokenLayout
from attnzoo.attention.edits.traits import Editing, LayerSizes, layer_sizes

__all__ = [
    "ALL",
    "GENERATED",
    "Add",
    "After",
    "CopyHead",
    "Edit",
    "EditCost",
    "EditPlan",
    "EditRun",
    "EditRuns",
    "Editing",
    "Edits",
    "Entropy",
    "Except",
    "HeadFilter",
    "Hide",
    "Item",
    "KeySums",
    "LayerCost",
    "LayerPlan",
    "LayerReading",
    "LayerSizes",
    "Map",
    "Mass",
    "Move",
    "PutScores",
    "PutWeights",
    "Raise",
    "Read",
    "ReadResult",
    "Reading",
    "Scale",
    "Sinks",
    "Span",
    "Temper",
    "TokenLayout",
    "TopKeys",
    "Values",
    "Where",
    "check_rows",
    "check_runs",
    "layer_plan",
    "layer_plans",
    "layer_sizes",
]
