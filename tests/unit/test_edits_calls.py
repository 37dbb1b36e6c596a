"""What a call of a layer refuses of its edits: rows and contexts that no plan speaks of."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnzoo.attention import build_attention
from attnzoo.attention.edits import (
    Add,
    EditRun,
    Edits,
    Entropy,
    Except,
    HeadFilter,
    Hide,
    Map,
    Mass,
    Move,
    PutScores,
    PutWeights,
    Scale,
    Sinks,
    Span,
    TokenLayout,
    Where,
    layer_plan,
    layer_sizes,
)
from attnzoo.models import DecoderConfig, DecoderLM
from attnzoo.ops.common.masks import Mask, padding_starts
from tests.helpers.serving import small_model

DIM = 24


def runs_of(layer, lists, layout, total, context=False):
    sizes = [layer_sizes(layer, context=context)]
    plans = [None if items is None else Edits(*items).plan(sizes, layout, total - layout.prompt) for items in lists]
    return [None if plan is None else EditRun(plan) for plan in plans]


def test_a_layer_refuses_what_its_plan_does_not_speak_of():
    """As a model does: rows longer than planned, and contexts of another length, in forward and extend; a refused call
    leaves the run as it was. Kills: tokens and keys that no edit reaches, without a word."""
    layer = build_attention("mha", {"model_dim": DIM, "num_heads": 4, "num_kv_heads": 2}).double()
    x, context = torch.randn(2, 5, DIM).double(), torch.randn(2, 7, DIM).double()
    short = runs_of(layer, [[Map()], None], TokenLayout(3), 3)
    with pytest.raises(ValueError, match=r"edits\[0\] were planned for 3 tokens, and the row has 5"):
        layer(x[:1], edits=layer_plan(short[:1], 0))
    with pytest.raises(ValueError, match="and the row has 5"):
        layer(x, mask=Mask(starts_BT=padding_starts(torch.tensor([5, 2]), 5, "left")), edits=layer_plan(short, 0))
    layer(x, mask=Mask(starts_BT=padding_starts(torch.tensor([3, 5]), 5, "right")), edits=layer_plan(short, 0))
    exists = torch.ones(2, 7, dtype=torch.bool)
    exists[0, 5:] = False
    for planned, keys, words in (
        (4, exists, "were planned for a context of 4 tokens, and the layer reads one of 5 to 7"),
        (8, exists, "were planned for a context of 8 tokens, and the layer reads one of 5 to 7"),
        (5, None, "were planned for a context of 5 tokens, and the layer reads one of 7"),
        (None, exists, "were planned for no context, and the layer reads one of 5 to 7; say so by TokenLayout"),
        (5, exists, None),
        (6, exists, None),
        (7, None, None),
    ):
        layout = TokenLayout(5, context=None if planned is None else TokenLayout(planned))
        runs = runs_of(layer, [[Map()], None], layout, 5, context=planned is not None)
        forms = (
            lambda runs=runs, keys=keys: layer(x, context_BSD=context, mask=Mask.full(keys), edits=layer_plan(runs, 0)),
            lambda runs=runs, keys=keys: layer.extend(x, layer.init_context(context, keys), edits=layer_plan(runs, 0)),
        )
        for form in forms if words else forms[:1]:
            if words:
                with pytest.raises(ValueError, match=rf"edits\[0\] {words}"):
                    form()
            else:
                form()
    runs = runs_of(layer, [[Map()], None], TokenLayout(5, context=TokenLayout(4)), 5, context=True)
    for form in (
        lambda: layer(x, edits=layer_plan(runs, 0)),
        lambda: layer.extend(x, layer.init_state(2, 5), edits=layer_plan(runs, 0)),
    ):
        with pytest.raises(ValueError, match="planned for a context of 4 tokens, and the layer reads none"):
            form()
    layer(x, context_BSD=context[:, :4], edits=layer_plan(runs, 0))  # it is still at its beginning
    regression = build_attention("softmax_regression", {"model_dim": DIM}).double()
    with pytest.raises(ValueError, match="planned for 3 tokens, and the row has 5"):
        regression(x[:1], edits=layer_plan(runs_of(regression, [[Map()]], TokenLayout(3), 3), 0))


class Operations(TorchDispatchMode):
    """The names of all operations that run, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["mha", "rcmha", "linear"])
@torch.no_grad()
def test_where_no_row_has_edits_the_same_operations_run(kind):
    """Kills: what is prepared for edits, or copied, before it is known that there are any."""
    model, tokens = small_model(kind), torch.arange(12).view(2, 6)
    found = []
    for edits in (None, [None, None]):
        for _ in range(2):  # what a first call makes and keeps is not counted
            with Operations() as operations:
                outputs = [model(tokens, edits=edits)]
                state = model.init_state(2, 9)
                for chunk in (tokens, tokens[:, :1]):
                    logits, state = model.extend(chunk, state, edits=edits)
                    outputs.append(logits)
        found.append((outputs, operations.names))
    (without, expected), (idle, names) = found
    assert names == expected
    assert len(names) > 100
    assert all(map(torch.equal, idle, without))


def test_there_is_an_entry_for_each_row():
    """Of None alone, too, of which no layer would say anything."""
    model, tokens = small_model("mha"), torch.zeros(1, 5, dtype=torch.long)
    for entries in ([], [None, None]):
        words = f"edits have {len(entries)} entries, and the batch has 1 rows"
        with pytest.raises(ValueError, match=words):
            model(tokens, edits=entries)
        with pytest.raises(ValueError, match=words):
            model.extend(tokens, model.init_state(1, 9), edits=entries)
    with pytest.raises(ValueError, match=r"starts_BT has shape \[1, 4\]; it must be \[1, 5\]"):
        model(tokens, torch.zeros(1, 4, dtype=torch.long), edits=[None])


def decoder(kind="mha", layers=1, heads=4, dtype=torch.float32, **options):
    config = DecoderConfig(
        vocab_size=20,
        model_dim=DIM,
        num_layers=layers,
        attention=[{"kind": kind, "num_heads": heads} | options],
        max_positions=16,
        tie_embeddings=False,
        init_std=0.3,
    )
    return DecoderLM(config).eval().requires_grad_(False).to(dtype)


def test_a_plan_made_for_another_model_is_refused_by_what_differs():
    """In forward and extend. Kills: a key that linear attention is said to hide and does not; numbers that were checked
    against float64 and are infinite in float32; edits of layers that are not there."""
    tokens, hide = torch.zeros(1, 5, dtype=torch.long), Edits(Hide(Where(keys=0)))
    exact = {"dtype": torch.float64}
    for planned, run, edits, words in (
        (exact, exact | {"kind": "linear"}, hide, "attention of MHA, and the layer is Linear"),
        (exact, exact | {"kind": "mesa"}, Edits(Map()), "attention of MHA, and the layer is Mesa"),
        ({}, {"heads": 2}, hide, "4 query heads, and the layer has 2"),
        (exact, {}, Edits(Add(Where(keys=(1, 2)), 1e13)), "scores in float64, and those of the layer are float32"),
        ({"layers": 2}, {}, hide, "2 layers, and the model has 1"),
        ({}, {"layers": 2}, hide, "1 layers, and the model has 2"),
        ({}, {"dtype": torch.float16}, hide, "outputs in float32, and those of the layer are float16"),
        ({"dtype": torch.bfloat16}, exact, hide, None),
        ({}, {"dtype": torch.bfloat16}, hide, None),
    ):
        plan = decoder(**planned).plan_edits(edits, TokenLayout(5), streams=False)
        model = decoder(**run)
        forms = (
            lambda model=model, plan=plan: model(tokens, edits=[EditRun(plan)]),
            lambda model=model, plan=plan: model.extend(tokens, model.init_state(1, 5), edits=[EditRun(plan)])[0],
        )
        for form in forms:
            if words is None:
                assert form().isfinite().all()
                continue
            with pytest.raises(ValueError, match=rf"edits\[0\] were planned for {words}.*; plan them for this model"):
                form()


def test_half_precision_that_would_hold_inf_is_refused():
    """Where weights have no bound, or outputs are in fp16. Kills: an inf in a map or in logits without a word."""
    layout, tokens = TokenLayout(5), torch.zeros(1, 5, dtype=torch.long)
    open_ended = decoder("linear", normalise=False)
    with pytest.raises(ValueError, match=r"edits\[0\].map: weights of layer 0 \(Linear\) have no bound.*dtype='fp32'"):
        open_ended.plan_edits(Edits(Map()), layout, streams=False)
    for model, reads in ((open_ended, Map(dtype="fp32")), (decoder("linear"), Map())):
        run = EditRun(model.plan_edits(Edits(reads), layout, streams=False))
        model(tokens, edits=[run])
        assert run.reading[0].map.isfinite().all()
    half = decoder(dtype=torch.float16)
    for edit, field in (
        (Scale(Where(keys=0), 1e6, renormalise=False), "scale"),
        (PutWeights(Where(keys=0, queries=4), [[[1e5]]]), "put_weights"),
    ):
        with pytest.raises(
            ValueError, match=rf"edits\[0\].{field} makes .* overflow; give smaller.*bfloat16 or float32"
        ):
            half.plan_edits(Edits(edit), layout)
        assert decoder(dtype=torch.bfloat16).plan_edits(Edits(edit), layout).changes
    run = EditRun(half.plan_edits(Edits(Scale(Where(keys=0), 200.0, renormalise=False)), layout))
    assert half(tokens, edits=[run]).isfinite().all()


def test_a_filter_at_the_boundary_and_a_row_of_one_key():
    """Kills: rounding that decides whether a row with all its weight on all keys has a mass of 1; an entropy of -0."""
    model, tokens = decoder(), torch.randint(0, 20, (1, 60))
    layout = TokenLayout(56, {"a": (0, 4), "b": (4, 9)})
    moved = []
    for read in (Mass(bins={"a": "a"}), Map(dtype="fp32"), Entropy()):
        move = Move(Where(keys="a", queries=Span(10, 56)), "b", 1.0, HeadFilter(min_mass=1.0))
        run = EditRun(model.plan_edits(Edits(move, read), layout, 4))
        with torch.no_grad():
            model(tokens, edits=[run])
        moved.append(run.reading[0])
    assert float(moved[0].mass["a"][:, 10:56].max()) < 1e-6, "a row was not moved in one pass"
    assert float(moved[1].map[:, 10:56, :4].max()) < 1e-6, "a row was not moved in a map"
    assert not bool(torch.signbit(moved[2].entropy).any())


def test_values_of_other_types_or_ranges_are_refused_by_name():
    """Kills: AttributeError and TypeError from inside."""
    model = decoder()
    for call, words in (
        (lambda: Move(Where(keys=0), to=1, share=0.5, only_heads="all"), "Move.only_heads='all' must be a HeadFilter"),
        (lambda: model.plan_edits([Map()], TokenLayout(5)), r"edits is a list; give Edits\(...\)"),
        (lambda: model.plan_edits(Edits(Map()), 8), r"layout=8 must be TokenLayout\(prompt=...\)"),
        (lambda: Sinks(1, tau=1.0), "Sinks.channels=1 must be a list of one or more channel numbers"),
        (lambda: Sinks("12", tau=1.0), "Sinks.channels='12' must be a list"),
        (lambda: model.plan_edits(Edits(Map()), TokenLayout(5), max_bytes=-1), "max_bytes=-1 must be at least 0"),
        (lambda: Map(what="values"), "Map.what='values' must be 'weights' or 'scores'"),
        (lambda: HeadFilter(min_mass=-1), "HeadFilter.min_mass=-1 must be a finite number of at least 0"),
        (lambda: Where(keys={1, 2}), r"Where.keys=\{1, 2\}: give positions, a Span, the name of a span, or a list"),
        (lambda: Where(queries=slice(1, 2)), "Where.queries=slice"),
        (lambda: Move(Where(keys=0), to=None, share=0.5), "Move.to=None: give positions"),
        (lambda: Except([True]), "Except.of=True: give positions"),
        (lambda: HeadFilter(of=1.5), "HeadFilter.of=1.5: give positions"),
        (lambda: Mass(bins={1: 0}), "Mass.bins: 1 is no name"),
        (lambda: Mass(bins={"": 0}), "Mass.bins: '' is no name"),
        (lambda: Mass(bins={"a": {0}}), r"Mass.bins\['a'\]=\{0\}: give positions"),
        (lambda: TokenLayout(5, {"": (0, 1)}), "TokenLayout.spans: '' is no name"),
        (lambda: TokenLayout(5, {1: (0, 1)}), "TokenLayout.spans: 1 is no name"),
        (lambda: PutWeights(Where(), [[[float("nan")]]]), "PutWeights.weights of shape .* must be finite"),
        (lambda: PutScores(Where(), [[[float("inf")]]]), "PutScores.scores of shape .* must be finite"),
        (lambda: HeadFilter(min_share=5.0), "HeadFilter.min_share=5.0 must be .* at most 1"),
        (lambda: model([[1, 2]]), "tokens_BT is a list; give a tensor"),
        (
            lambda: model.extend(torch.ones(1, 2).numpy(), model.init_state(1, 4)),
            "tokens_BT is a ndarray; give a tensor",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()
