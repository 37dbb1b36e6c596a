"""How much edits may name: many sets, long sequences, positions in one another."""

import pytest
import torch

from attnzoo.attention.edits import (
    Edits,
    Except,
    HeadFilter,
    Hide,
    Mass,
    Move,
    Sinks,
    TokenLayout,
    TopKeys,
    Where,
)
from attnzoo.attention.edits.classes import KeySets
from tests.helpers.edits_cases import PLANNED as LAYOUT
from tests.helpers.edits_cases import SOFTMAX


def test_many_sets_and_long_sequences():
    """Kills: codes of sets in 64 bits; a plan whose time or memory grows with the tokens, or with the square of what is
    named; classes that a second kind of sinks does not tell apart."""
    plan = Edits(Hide(Where(keys=0))).plan([SOFTMAX], LAYOUT, 10**12)
    assert plan.cost.layers[0].flops > 10**24
    number = 70
    masses = Mass(bins={f"b{n}": (n, (7 * n + 3) % number, number) for n in range(number)})
    layer = Edits(masses).plan([SOFTMAX], TokenLayout(number + 2)).layers[0]
    assert layer is not None
    sets = KeySets(layer.sets, layer.codes, layer.keys, torch.device("cpu"))
    at = torch.arange(-1, number + 3)
    for held in layer.sets:
        assert sets.holds(held, at)[:-1].tolist() == held.holds(at)[:-1].tolist()
    many = {"a": [(2 * n, 2 * n + 1) for n in range(20_000)]}
    assert Edits(Hide(Where(keys="a"))).plan([SOFTMAX], TokenLayout(40_000, many)).layers[0].codes == (0, 1)
    near = [Hide(Where(keys=Sinks((n,), tau=20.0))) for n in range(9)]
    assert len(Edits(*near[:3]).plan([SOFTMAX], LAYOUT).layers[0].codes) == 8
    with pytest.raises(ValueError, match="edits name 9 different Sinks in one layer; at most 8"):
        Edits(*near).plan([SOFTMAX], LAYOUT)


def test_positions_in_one_another_have_an_end():
    """Kills: a RecursionError where they are hashed, compared, planned or written."""
    inner, nested = 0, 0
    for _ in range(32):
        inner, nested = Except(inner), (nested,)
    assert Edits.from_json(Edits(Hide(Where(keys=inner)), Hide(Where(keys=nested))).to_json())
    for build in (lambda: Except(inner), lambda: Where(keys=(inner,)), lambda: Where(keys=(nested,))):
        with pytest.raises(ValueError, match="has more than 32 levels of lists and Excepts; flatten it"):
            build()
    wrong = Move(Where(keys=0), to=1, share=0.5, only_heads=HeadFilter(of="zz"))
    with pytest.raises(ValueError, match=r"edits\[0\].move.only_heads.of: no span is called 'zz'"):
        Edits(wrong).plan([SOFTMAX], LAYOUT)
    with pytest.raises(ValueError, match=r"TopKeys.k=1.0 must be a whole number of at least 1"):
        TopKeys(k=1.0)
