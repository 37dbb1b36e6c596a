"""The language of reads and edits: JSON and back, words to numbers, every refusal before anything is computed, cost."""

from dataclasses import replace

import pytest
import torch

from attnzoo.attention.edits import (
    Add,
    CopyHead,
    Editing,
    EditRun,
    Edits,
    Entropy,
    Except,
    HeadFilter,
    Hide,
    KeySums,
    LayerSizes,
    Map,
    Mass,
    Move,
    PutScores,
    PutWeights,
    Raise,
    Scale,
    Sinks,
    Span,
    Temper,
    TokenLayout,
    TopKeys,
    Where,
    layer_plan,
)
from attnzoo.attention.edits.classes import KeySets, class_codes
from attnzoo.attention.edits.spans import chosen, picked_steps
from tests.helpers.edits_cases import PLANNED as LAYOUT
from tests.helpers.edits_cases import SOFTMAX

LINEAR = LayerSizes(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    variant="linear",
    editing=Editing(softmax=False, reads=True, weights=True, streams=False, why_not="there is no softmax"),
)
SIZES = [SOFTMAX, SOFTMAX, LINEAR]
EVERYTHING = Edits(
    Add(Where(layers="1:3", heads=[0, -1], queries=Span(-3, "end"), keys=Span.after("image"), steps="2:"), -1.5),
    Hide(Where(keys=(0, "system", Span(3, 5)))),
    Temper(Where(queries="generated"), 0.5, magnitude=True),
    PutScores(Where(queries=3, keys=Span(0, 2)), [[[1.0, 2.0]]]),
    Scale(Where(keys=Except(Sinks((3, 7), 20.0))), 0.25, renormalise=False),
    Raise(Where(keys="image"), 0.4),
    PutWeights(Where(queries=3, keys=4), [[[0.5]]], renormalise=True),
    CopyHead(Where(heads=0), 3),
    Move(Where(keys=Sinks((3,), 20.0)), "image", 0.6, HeadFilter(of="image", min_mass=0.2, min_share=0.5)),
    Mass(Where(layers=-1), {"sinks": Sinks((3,), 20.0), "image": "image"}),
    TopKeys(k=5),
    KeySums(),
    Entropy(),
    Map(Where(heads=1), what="scores", dtype="fp32"),
)


def test_json_and_back():
    data = EVERYTHING.to_json()
    again = Edits.from_json(data)
    assert again == EVERYTHING
    assert hash(again) == hash(EVERYTHING)
    assert again.fingerprint == EVERYTHING.fingerprint
    assert Edits(*EVERYTHING.items[::-1]).fingerprint != EVERYTHING.fingerprint  # the order says something
    bins = {"sinks": {"sinks": {"channels": [3], "tau": 20.0}}, "image": "image"}
    assert data[9] == {"mass": {"where": {"layers": [-1]}, "bins": bins}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"scale": {}}, "edits={'scale': {}} must be a list"),
        ([{"scal": {}}], r"edits\[0\]: unknown read or edit 'scal'; did you mean 'scale'"),
        ([{"scale": {}, "add": {}}], r"edits\[0\]=.* must be an object with one name"),
        ([{"scale": {"faktor": 2}}], r"edits\[0\].scale: unknown field 'faktor'; did you mean 'factor'"),
        ([{"scale": {"where": {"layer": [2]}}}], r"\[0\].scale.where: unknown field 'layer'; did you mean 'layers'"),
        ([{"scale": {"where": {"heads": 1.5}}}], r"edits\[0\].scale.where.*heads=1.5"),
        ([{"scale": {"where": {"keys": {"spam": [1]}}}}], r"\[0\].scale.where.keys=.* no positions; did you mean"),
        ([{"scale": {"where": {"keys": {"span": [1, "stop"]}}}}], r"edits\[0\].scale.where.keys=.* no positions"),
        ([{"scale": {"where": {"keys": {"sinks": {"channels": []}}}}}], "where.keys.sinks=.*channels and tau"),
        (
            [{"scale": {"where": {}, "factor": -1}}],
            r"edits\[0\].scale: Scale.factor=-1 must be a finite number of at least 0",
        ),
        ([{"add": {"where": {}, "value": "1"}}], r"edits\[0\].add: Add.value='1'"),
        ([{"raise": {"where": {}, "share": 1.5}}], "Raise.share=1.5 .* at most 1"),
        ([{"put_weights": {"where": {}, "weights": [[-1]]}}], "numbers below 0"),
        ([{"put_scores": {"where": {}, "scores": [1]}}], "finite numbers .heads, queries, keys."),
        ([{"hide": {}}], r'hide.where is missing: say what it changes, such as {"keys": "image"}; {} is everything'),
        ([{"scale": {"where": {"keys": 0}}}], r"edits\[0\].scale.factor is missing: say by how much to multiply"),
        ([{"move": {"where": {}, "share": 0.1}}], r"edits\[0\].move.to is missing: say which keys receive"),
        ([{"map": {"dtype": "int8"}}], "Map.dtype='int8' must be 'fp16', 'fp32', 'fp64' or left out"),
        ([{"map": {"what": "scores", "dtype": "fp16"}}], r"\[0\].map: Map.dtype='fp16' holds no scores beyond 65504"),
        ([{"top_keys": {"k": 0}}], "TopKeys.k=0"),
        ([{"mass": {"where": {"keys": 1}, "bins": {"a": 0}}}], "Mass: where.keys and bins both name keys"),
        ([{"mass": {"bins": ["image"]}}], r"edits\[0\].mass.bins=.* object of positions by name"),
        ([{"move": {"only_heads": {"mass": 1}}}], r"edits\[0\].move.only_heads: unknown field 'mass'"),
        ([{"hide": {"where": {"heads": " 0 : 1 "}}}], "Where.heads=' 0 : 1 ': give 'all', whole numbers, ranges"),
        ([{"hide": {"where": {"layers": "0_0:1"}}}], "Where.layers='0_0:1': give 'all'"),
        ([{"hide": {"where": {"steps": "\uff11:"}}}], "Where.steps=.*: give 'all'"),
        ([{"hide": {"where": {"heads": "9" * 5000 + ":"}}}], "Where.heads=.*: give 'all'"),
    ],
)
def test_json_that_says_nothing_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        Edits.from_json(data)


def test_numbers_that_overflow_are_refused_by_field():
    """In the dtype of a layer's scores, before anything is computed. Kills: numbers that make NaN, for which weights
    are blamed; a bound for layers that compute in more."""
    exact = replace(SOFTMAX, scores_in=torch.float64, outputs_in=torch.float64)
    for item, field in (
        (Add(Where(layers=1), 1e39), "add.value=1e"),
        (Temper(Where(), -1e39), "temper.factor=-1e"),
        (Scale(Where(), 1e39), "scale.factor=1e"),
        (PutScores(Where(queries=1, keys=0), [[[1e39]]]), "put_scores.scores=1e"),
        (PutWeights(Where(queries=1, keys=0), [[[1e39]]]), "put_weights.weights=1e"),
    ):
        with pytest.raises(
            ValueError, match=rf"edits\[1\].{field}.39 overflows in layer [01], whose scores are float32"
        ):
            Edits(Map(), item).plan([SOFTMAX, SOFTMAX], LAYOUT)
        if not isinstance(item, Add):
            assert Edits(item).plan([exact, exact], LAYOUT).changes
    for size, most, words in ((SOFTMAX, 8e4, "give at most 8e.04 in magnitude, or use Hide"), (exact, 4e13, "4e.13")):
        assert Edits(Add(Where(layers=0), -most)).plan([size], LAYOUT).changes
        with pytest.raises(
            ValueError, match=rf"edits\[0\].add.value=-.* leaves no digits of scores in layer 0.*{words}"
        ):
            Edits(Add(Where(layers=0), -1.2 * most)).plan([size], LAYOUT)
    with pytest.raises(ValueError, match="must be numbers in nested lists"):
        PutScores(Where(), [[[10**400]]])
    with pytest.raises(ValueError, match="are complex; give real numbers"):
        PutScores(Where(), torch.ones(1, 1, 1, dtype=torch.complex64))
    for make in (lambda: HeadFilter(min_mass=10**5000), lambda: Add(Where(), 10**400), lambda: Scale(Where(), 10**400)):
        with pytest.raises(
            ValueError, match=r"^(HeadF|Add|Scale).*(min_mass|value|factor) is a whole number beyond 1e308"
        ):
            make()
    with pytest.raises(ValueError, match=r"Sinks.tau=1000"):
        Sinks((1,), 10**400)


def test_numbers_that_overflow_together_are_refused():
    """Each alone would do. Kills: numbers of other heads counted in; renormalised rows taken for grown ones."""
    raised, moved = Scale(Where(heads=1), 1e15, renormalise=False), Move(Where(keys=0), "image", 0.5)
    put = PutWeights(Where(heads=1, queries=1, keys=0), [[[1e15]]])
    for items, field in (
        ([Temper(Where(keys=0), 1e15)] * 3, r"edits\[2\].temper"),
        ([PutScores(Where(queries=1), [[[-1e15] * 10]]), *[Temper(Where(), -1e15, True)] * 2], r"edits\[2\].temper"),
        ([raised, put, moved, *[raised] * 2], r"edits\[4\].scale"),
        ([raised, CopyHead(Where(heads=0), 1), *[Scale(Where(heads=0), 1e15, False)] * 2], r"edits\[3\].scale"),
    ):
        with pytest.raises(ValueError, match=rf"{field}.*with the edits before it numbers of up to .* in layer 0"):
            Edits(*items).plan([SOFTMAX], LAYOUT)
    apart = [Scale(Where(heads=head), 1e15, renormalise=False) for head in range(4)]
    kept = [Scale(Where(keys=0), 1e15)] * 4
    sums = [Add(Where(keys=0), -8e4)] * 4
    assert Edits(*apart, *kept, *sums).plan([SOFTMAX], LAYOUT).changes


def test_maps_hold_the_weights_that_edits_make():
    """A map in half precision holds no weight above 65504. Kills: a default that turns large weights into inf."""
    large = Scale(Where(heads=1, keys=0), 1e6, renormalise=False)
    put = PutWeights(Where(heads=[1], queries=1, keys=(0, 1)), [[[4e4, 4e4]]])
    for edit in (large, put):
        words = r"edits\[0\].map: weights of up to .* in layer 0, and fp16 holds none above 65504; give dtype='fp32'"
        for read in (Map(), Map(Where(heads=1), dtype="fp16")):
            with pytest.raises(ValueError, match=words):
                Edits(read, edit).plan([SOFTMAX], LAYOUT)
        for items in (
            [edit, Map(dtype="fp32")],
            [edit, Map(Where(heads=0))],
            [edit, Map(what="scores")],
            [Scale(Where(), 1e6), Map()],
        ):
            assert Edits(*items).plan([SOFTMAX], LAYOUT).changes


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("all", range(14)),
        ("generated", range(10, 14)),
        ("system", (0, 1, 8)),
        (-1, [9]),
        (Span(-3, "end"), (7, 8, 9)),
        (Span(9, 12), (9, 10, 11)),
        (Span.after("image"), range(6, 14)),
        (Except("system"), (2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13)),
        ((0, "image", Span(5, 8)), (0, 2, 3, 4, 5, 6, 7)),
    ],
)
def test_words_for_positions(words, expected):
    """Kills: ends off by one; numbers from the sequence's end instead of the prompt's."""
    found = chosen(words, LAYOUT, 14, "keys")
    assert found.numbers() == list(expected)
    at = torch.arange(-1, 16)
    assert at[found.holds(at)].tolist() == list(expected)
    assert found.rank(at)[found.holds(at)].tolist() == list(range(len(expected)))


def test_sinks_and_all_but_sinks():
    sinks = Sinks((1,), 1.5)
    hidden = torch.tensor([[0.1, 3.0, 0.1], [1.0, 1.0, 1.0], [0.0, -2.0, 0.5]])
    assert sinks.found(hidden).tolist() == [True, False, True]
    assert sinks.found_in(hidden[None]) == [[True, False, True]]
    at = torch.arange(-1, 5)
    both, rest = (chosen(w, LAYOUT, 14, "keys") for w in ((sinks, 1), Except((sinks, 3))))
    sets = KeySets((both, rest), class_codes((both, rest), 4)[1], 4, at.device)
    before = sets.table
    sets.observe({sinks: sinks.found(hidden)}, 0, 3)
    assert at[sets.holds(both, at)].tolist() == [0, 1, 2]
    assert at[sets.holds(rest, at)].tolist() == [1, 4]
    assert sets.table[0].argmax(0).tolist() == sets.classes(at).tolist() != before[0].argmax(0).tolist()


def test_steps_are_tokens_or_calls():
    """Kills: step 1 taken for the prompt's last token."""
    assert picked_steps((0,), LAYOUT, "steps")[0] == ((0, 10),)
    assert picked_steps((1, "3:5"), LAYOUT, "steps")[0] == ((10, 11), (12, 14))
    assert picked_steps(("2:",), LAYOUT, "steps")[0][0][0] == 11
    calls = TokenLayout(10, steps=50)
    assert picked_steps(("0:20",), calls, "steps") == (((0, 2**40),), ((0, 20),))
    plan = Edits(Add(Where(steps="1:3"), 1.0)).plan([SOFTMAX], calls)
    assert [plan.layers[0].items[0].in_call(step) for step in range(4)] == [False, True, True, False]
    with pytest.raises(ValueError, match=r"step=None with TokenLayout\(steps=50\)"):
        layer_plan([EditRun(plan)], 0)
    with pytest.raises(ValueError, match="planned for 1 layers, and there is a layer 1"):
        layer_plan([EditRun(plan)], 1, step=2)


def test_runs_that_are_none_of_the_row():
    run = EditRun(Edits(Add(Where(), 1.0)).plan([SOFTMAX], LAYOUT))
    with pytest.raises(ValueError, match=r"edits\[1\] is the run of another row"):
        layer_plan([run, run], 0)
    with pytest.raises(ValueError, match=r"edits\[0\] is a Edits; give EditRun\(plan\)"):
        layer_plan([Edits()], 0)
    with pytest.raises(ValueError, match=r"Span\(1.5, None\) must be whole numbers"):
        Span(1.5)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Add(Where(layers=3), 1.0), r"edits\[0\].add.where.layers=3 is out of range: there are 3, numbered 0 to 2"),
        (Add(Where(layers=0, heads="2:5"), 1.0), r"where.heads='2:5' is out of range: there are 4"),
        (Add(Where(layers=0, heads="2:2"), 1.0), r"where.heads=.*selects nothing of 4"),
        (Add(Where(layers=0, heads=[0, "3:1"]), 1.0), r"where.heads='3:1' selects nothing of 4"),
        (Add(Where(layers=0, heads=[0, range(2, 2)]), 1.0), r"where.heads='2:2' selects nothing of 4"),
        (Add(Where(layers=0, keys="imagge"), 1.0), "where.keys: no span is called 'imagge'; did you mean 'image'"),
        (
            Add(Where(layers=0, keys="-2:"), 1.0),
            r"no span is called '-2:'; the positions from one to another are Span\(-2, 'end'\), in JSON "
            r'{"span": \[-2, "end"\]}',
        ),
        (Add(Where(layers=0, keys="9" * 5000 + ":"), 1.0), "no span is called '999"),
        (Add(Where(layers=0, keys="-:"), 1.0), "no span is called '-:'; known"),
        (Add(Where(layers=0, keys=Span(5, 15)), 1.0), r"Span\(start=5, stop=15\).*14 tokens"),
        (Add(Where(layers=0, keys=-11), 1.0), r"is \[-1, 0\)"),
        (Add(Where(layers=0, keys=()), 1.0), r"keys=\(\) selects nothing"),
        (Add(Where(layers=0, queries="image", steps="1:"), 1.0), "selects nothing: no query of 'image' is in steps"),
        (Add(Where(layers=0, queries=Sinks((1,), 2.0)), 1.0), "only keys may be Sinks"),
        (Add(Where(layers=0, keys=Sinks((32,), 2.0)), 1.0), "no such channels in layer 0 .there are 32."),
        (Add(Where(layers=-1), 1.0), r"layer 2 \(linear\) cannot have its scores edited: there is no softmax"),
        (Scale(Where(), 2.0), r"layer 2 \(linear\) cannot have its weights edited in extend"),
        (CopyHead(Where(layers=0), 4), "copy_head.source=4 must be the number of a head, 0 to 3"),
        (PutScores(Where(layers=0, queries=3, keys="image"), [[[1.0]]]), r"scores has shape \[1, 1, 1\].*\[4, 1, 4\]"),
        (Map(Where(layers=0, keys=Sinks((1,), 2.0))), "Map needs keys that are known before; Mass reads Sinks"),
        (Mass(Where(layers=0), {"a": "image", "b": "imag"}), "mass.b: no span is called 'imag'"),
        (Move(Where(layers=0), "nowhere", 0.5), "move.to: no span is called 'nowhere'"),
    ],
)
def test_plans_refuse_before_anything_is_computed(item, message):
    with pytest.raises(ValueError, match=message):
        Edits(item).plan(SIZES, LAYOUT, 4)


def test_other_refusals():
    with pytest.raises(ValueError, match="is no read and no edit"):
        Edits(Where())
    with pytest.raises(ValueError, match="'all' has a meaning of its own"):
        TokenLayout(3, {"all": (0, 1)})
    with pytest.raises(ValueError, match=r"\(1, 4\) must be \[start, stop\) within the 3 tokens"):
        TokenLayout(3, {"image": (1, 4)})
    with pytest.raises(ValueError, match=r"layer 0 attends to a context; say by TokenLayout\(context"):
        Edits(Hide(Where(keys=0))).plan([LayerSizes(**{**vars(SOFTMAX), "context": True})], LAYOUT)
    with pytest.raises(ValueError, match="joins no other positions"):
        Edits(Hide(Where(keys=(Except(Sinks((1,), 2.0)), 3)))).plan([SOFTMAX], LAYOUT)
    with pytest.raises(ValueError, match="new_tokens=-1"):
        Edits().plan([SOFTMAX], LAYOUT, -1)


def test_lists_of_positions_are_tuples_wherever_they_stand():
    """Kills: edits that cannot be hashed, or are not equal to the same ones."""
    for make in (
        lambda x: Hide(Where(keys=x, queries=x)),
        lambda x: Hide(Where(keys=Except(x))),
        lambda x: Hide(Where(keys=[Except([x])])),
        lambda x: Move(Where(), [x], 0.5, HeadFilter(of=[Except(x)])),
        lambda x: Mass(bins={"a": [x, Except(x)]}),
    ):
        found, same = (Edits(make(x)) for x in ([0, [2, "image"]], (0, (2, "image"))))
        assert found == same
        assert hash(found) == hash(same)
        assert found.plan([SOFTMAX], LAYOUT).fingerprint == same.plan([SOFTMAX], LAYOUT).fingerprint


def test_reads_above_the_limit_are_refused_with_their_bytes():
    big = 4 * 14 * 14 * 2
    with pytest.raises(ValueError, match=rf"return {2 * big:,} bytes.* limit of 1,000; edits\[0\] takes {big:,}"):
        Edits(Map(Where(layers="0:2"))).plan(SIZES, LAYOUT, 4, max_bytes=1000)
    plan = Edits(Map(Where(layers="0:2"))).plan(SIZES, LAYOUT, 4)
    assert plan.cost.returned_bytes == 2 * big
    assert plan.cost.peak_bytes >= plan.cost.returned_bytes


def test_engines_and_idle_edits():
    """Kills: an edit that changes nothing and is computed; five classes taken for four."""
    edits = (
        Add(Where(), 0.0),
        Scale(Where(), 1.0),
        Move(Where(), "image", 0.0),
        Temper(Where(), 1.0),
        Raise(Where(), 0.0),
    )
    plan = Edits(*edits).plan(SIZES[:2], LAYOUT, 4)
    assert plan.layers == (None, None)
    assert not plan.changes
    assert layer_plan([EditRun(plan)], 0) is None
    assert [layer.engine for layer in plan.cost.layers] == ["off", "off"]
    assert plan.cost.flops == plan.cost.peak_bytes == plan.cost.returned_bytes == 0

    def engine(*items):
        return Edits(*items).plan([SOFTMAX], LAYOUT, 4).cost.layers[0].engine

    sinks = Sinks((1,), 9.0)
    four = [Mass(bins={"a": "image", "b": Span(4, 8)})]
    assert engine(*four) == engine(Move(Where(keys=sinks), "image", 0.5)) == "partitioned"
    assert engine(*four, Hide(Where(keys=9))) == engine(Temper(Where(), 2.0)) == engine(Map()) == "dense"
    assert engine(Move(Where(keys=sinks), "image", 0.5), Mass(bins={"s": "system"})) == "dense"  # up to six classes
    assert Edits(Add(Where(), 1.0)).plan([SOFTMAX], LAYOUT).fingerprint != plan.fingerprint


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ({"a": range(2)}, r"spans\['a'\]=range\(0, 2\): give \(start, stop\) in tokens, or a list of these"),
        ({"a": (0.0, 2.0)}, r"spans\['a'\]: \(0.0, 2.0\) must be \[start, stop\) within the 10 tokens"),
        ({"a": (True, 3)}, r"\(True, 3\) must be"),
        ({"a": [(0, 2), 5]}, r"spans\['a'\]: 5 must be"),
        ({"a": None}, r"spans\['a'\]=None: give"),
        ({"a": []}, "is empty: leave the name out"),
        ([("a", (0, 2))], r"spans=.* must be a mapping of intervals by name"),
    ],
)
def test_spans_that_are_none(spans, message):
    """Kills: a range of two numbers for a pair."""
    with pytest.raises(ValueError, match=message):
        TokenLayout(10, spans)


@pytest.mark.parametrize(
    ("where", "field"),
    [
        (Where(heads=[3, 1], queries=9, keys=2), "heads"),
        (Where(heads=[0, "0:1"], queries=9, keys=2), "heads"),
        (Where(heads=0, queries=(9, 8), keys=2), "queries"),
        (Where(heads=0, queries=9, keys=(5, 2)), "keys"),
        (Where(heads=0, queries=9, keys=("image", "system")), "keys"),
        (Where(heads=0, queries=9, keys=(5, 5)), "keys"),
    ],
)
def test_numbers_are_put_in_rising_order(where, field):
    """Kills: numbers of one key that land on another."""
    sizes = [1, 1, 1]
    sizes[["heads", "queries", "keys"].index(field)] = 2
    values = [[[0.5] * sizes[2]] * sizes[1]] * sizes[0]
    for item in (PutWeights(where, values), PutScores(where, values)):
        with pytest.raises(ValueError, match=rf"where.{field}=.*: numbers are put in rising order; name them so"):
            Edits(item).plan([SOFTMAX], LAYOUT)


def test_fingerprints_tell_layouts_apart():
    edits = Edits(Add(Where(steps=1), 1.0))
    layouts = [LAYOUT, TokenLayout(10, LAYOUT.spans, steps=3), TokenLayout(10, LAYOUT.spans, context=TokenLayout(4))]
    prints = {edits.plan([SOFTMAX], layout, 4).fingerprint for layout in layouts}
    assert len(prints | {edits.plan([SOFTMAX], LAYOUT, 5).fingerprint}) == 4
