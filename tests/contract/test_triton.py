"""Every variant with impl="triton": the same function, parallel and streaming, in float32 against float64.

On a machine without a GPU the kernels run in Triton's interpreter (tests/conftest.py).
"""

import functools

import pytest
import torch

from attnzoo.attention import ATTENTION
from attnzoo.kvcache import compressed
from tests.contract.caches import build_model, policy_of, prompt, run
from tests.contract.cases import (
    BATCH,
    MODEL_DIM,
    TOKENS,
    all_cases,
    build_case,
    case_name,
    gradients,
    inputs,
    stream,
)
from tests.contract.promises import refusal
from tests.contract.seeing import CONTEXT, masks_of


def has_kernels(case: tuple[str, dict]) -> bool:
    try:
        return "triton" in build_case(*case).implementations
    except Exception:  # the tests say why it cannot be built
        return "triton" in ATTENTION.get(case[0]).implementations


OUTSIDE = {"qkv_bias", "qk_norm", "rope_scaling"}
"""Options of what comes before every kernel: with and without them the kernels are given the same."""
KERNELS = [case for case in all_cases() if has_kernels(case) and not OUTSIDE & case[1].keys()]
"""Variants that say they have kernels; the contract sees that the others refuse impl="triton"."""

SINGLE = 2e-4
"""Relative to the largest entry: sums in float32 of numbers that the contract draws with a spread of 0.4 to 1."""


def assert_near(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    error = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1.0)
    assert error < SINGLE, f"{what}: differs by {error:.3g} of the largest entry"


@pytest.mark.parametrize("case", KERNELS, ids=lambda case: case_name(*case))
def test_an_implementation_is_what_it_says_in_both_forms(case):
    """A name that no operation has: whatever falls back to another one, in the parallel form or in streaming, runs."""
    attention, x = build_case(*case), inputs(BATCH, TOKENS, MODEL_DIM)
    attention._impl = "no such"

    def check(form: str, call) -> None:
        problem = refusal(call)
        assert problem is not None, (
            f"{form} computes without asking for impl: hand it to every operation, or leave 'triton' out of "
            f"{type(attention).__name__}.implementations"
        )
        assert "has no implementation 'no such'" in problem

    check("forward", lambda: attention(x))
    for name, mask in masks_of(attention).items():
        check(f"forward under the mask {name!r}", lambda mask=mask: attention(x, mask=mask))
    for mixing_alone in (False, True):
        if mixing_alone:
            attention.conv = None  # it is asked first; what follows must refuse too
        check("extend", lambda: attention.extend(x, attention.init_state(BATCH, TOKENS)))


@pytest.mark.parametrize("case", KERNELS, ids=lambda case: case_name(*case))
def test_kernels_make_the_same_function(case):
    exact, attention = build_case(*case), build_case(*case).float()
    attention.impl = "triton"
    x = inputs(BATCH, TOKENS, MODEL_DIM).requires_grad_()
    x32 = x.detach().float().requires_grad_()
    expected, actual = exact.reference(x), attention(x32)
    assert_near(actual, expected, "forward")
    right = gradients(exact, expected, x)
    names = list(right)
    weights = inputs(*expected.shape, seed=7).float()
    trained = [p for p in attention.parameters() if p.requires_grad]
    grads = torch.autograd.grad((actual * weights).sum(), [x32, *trained])
    for name, grad in zip(names, grads, strict=True):
        assert_near(grad, right[name], f"gradient of {name}")
    with torch.no_grad():
        assert_near(stream(attention, x32, [5, 1, 1, 6], TOKENS), expected, "streamed")


@pytest.mark.parametrize("case", KERNELS, ids=lambda case: case_name(*case))
def test_kernels_see_what_the_mask_shows(case):
    exact, attention = build_case(*case), build_case(*case).float()
    attention.impl = "triton"
    x = inputs(BATCH, TOKENS, MODEL_DIM)
    given: dict[str, dict] = {name: {"mask": mask} for name, mask in masks_of(attention).items()}
    if attention.traits.context:
        given["a context"] = {"context_BSD": inputs(BATCH, CONTEXT, MODEL_DIM, seed=4)}
    for name, options in given.items():
        if "pairs" in name:  # refused by name, whatever the variant
            assert "no mask with pairs" in str(refusal(functools.partial(attention, x.float(), **options)))
            continue
        single = {key: value.float() if isinstance(value, torch.Tensor) else value for key, value in options.items()}
        with torch.no_grad():
            assert_near(attention(x.float(), **single), exact(x, **options), name)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("variant", "policy"),
    [("gqa", "d2o-merge_counts"), ("gqa", "think-values"), ("rcmha", "d2o+think"), ("rcmha", "snapkv")],
)
def test_compressed_caches_on_kernels(variant, policy, monkeypatch):
    """Prefill, compression and decode steps are those of the implementation "torch"."""
    monkeypatch.setattr(compressed, "PAGE", 4)
    tokens, outputs = prompt(2, 16), {}
    for impl in ("torch", "triton"):
        model = build_model(variant, layers=2).float()
        for block in model.blocks:
            block.attention.impl = impl
        outputs[impl], state = run(model, policy_of(policy), tokens, 12)
    assert_near(outputs["triton"], outputs["torch"].double(), f"{variant} with {policy}")
    for block in model.blocks:
        block.attention._impl = "no such"
    with pytest.raises(ValueError, match="has no implementation 'no such'"):
        model.extend(tokens[:, :1], state)
