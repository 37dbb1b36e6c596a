"""A state that is continued in two ways gives right numbers, or is refused; a clone always gives right ones."""

import copy
import re

import pytest
import torch

from attnzoo import attention
from attnzoo.attention.base import StreamingAttention
from attnzoo.kvcache import compressed
from tests.contract.caches import frozen_model, policy_of, prompt
from tests.contract.cases import BATCH, MODEL_DIM, TOKENS, all_cases, assert_close, build_case, case_name, inputs

LAYERS = [
    pytest.param(kind, options, id=case_name(kind, options))
    for kind, options in all_cases()
    if issubclass(attention.ATTENTION.get(kind), StreamingAttention) and (not options or "window" in options)
]
NAMES = ("streaming", "snapkv", "d2o", "d2o-merge_counts", "think", "think-recomputed", "d2o+think")
REFUSED = r"^state: (the state before it has been continued a second time|it has been continued already)"


def goes_on(extend, rest, state, expected, what):
    """Whether a state can be continued; then its outputs are right."""
    try:
        out, _ = extend(rest, state)
    except ValueError as error:
        if not re.search(REFUSED, str(error)):
            raise
        return False
    assert_close(out, expected, what, tolerance=1e-9)
    return True


def check_branches(extend, begin, x, cut, forward):
    """begin(): a state after x[:, :cut]; forward: outputs of all of x after it. Returns what was refused."""
    middle, noise = cut + 3, x.flip(0, 1)[:, :3]
    refused = []
    first = begin()
    kept = first.clone()
    _, second = extend(x[:, cut:middle], first)
    assert goes_on(extend, x[:, cut:], kept, forward, "a clone, after the state was continued")
    if not goes_on(extend, noise, first, extend(noise, begin())[0], "a state, continued again"):
        refused.append("again")
    if not goes_on(extend, x[:, middle:], second, forward[:, middle - cut :], "the first continuation after a second"):
        refused.append("first")
        with pytest.raises(ValueError, match=REFUSED):
            second.clone()
    first = begin()
    extend(noise, first)  # a guess that is given up
    if not goes_on(extend, x[:, cut:], first, forward, "a state whose continuation was given up"):
        refused.append("given up")
    return refused


@pytest.mark.parametrize(("kind", "options"), LAYERS)
@torch.no_grad()
def test_a_state_continued_twice_is_right_or_refused(kind, options):
    """Kills: keys of another continuation, in four variants without an error."""
    layer, x = build_case(kind, options), inputs(BATCH, TOKENS, MODEL_DIM)
    for capacity in (TOKENS, 5):

        def begin(capacity=capacity):
            return layer.extend(x[:, :5], layer.init_state(BATCH, capacity))[1]

        refused = check_branches(layer.extend, begin, x, 5, layer(x)[:, 5:])
        if capacity < TOKENS or layer.traits.growth == "O(1)":
            assert "first" not in refused, "it shares no memory"
        elif layer.traits.growth == "O(T)":
            assert refused == ["first"], "a full cache can be rewound, and its first continuation is then lost"
        if capacity < TOKENS:
            continue
        whole = begin()
        for step in (5, 6):  # a pool that is written back as a whole
            out, after = layer.extend(x[:, step : step + 1], whole)
            assert_close(out, layer(x)[:, step : step + 1], "a pool")
            whole.fill(after)
        views = [begin().rows(slice(None)) for _ in range(2)]
        for view in views * 2:  # a server writes through the same views again and again
            view.fill(layer.extend(x[:, 5:6], view)[1])
            layer.extend(x[:, 5:6], view)  # a step that fails later, and is repeated


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_compressed_state_continued_twice_is_right_or_refused(name, monkeypatch):
    monkeypatch.setattr(compressed, "PAGE", 4)
    model, tokens = frozen_model("gqa", 3), prompt(2, 24)
    for compress in (True, False):

        def begin(compress=compress):
            _, state = model.extend(tokens[:, :14], model.init_state(2, 24, cache=policy_of(name)))
            return model.extend(tokens[:, 14:15], model.compress(state))[1] if compress else state

        cut = 15 if compress else 14
        state, outs = begin(), []
        for part in tokens[:, cut:].split(3, 1):
            out, state = model.extend(part, state)
            outs.append(out)
        check_branches(model.extend, begin, tokens, cut, torch.cat(outs, 1))


def test_a_deep_copy_is_a_clone():
    """Also of a state with a gradient to come, whose tensors torch does not copy."""
    layer, x = build_case("rcmha", {}), inputs(BATCH, TOKENS, MODEL_DIM)
    _, state = layer.extend(x[:, :5], layer.init_state(BATCH, TOKENS))
    assert any(tensor.requires_grad for tensor in state.tensors().values())
    other = copy.deepcopy(state)
    for each in (state, other):
        assert_close(layer.extend(x[:, 5:], each)[0], layer(x)[:, 5:], "a deep copy", tolerance=1e-9)
