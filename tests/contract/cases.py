"""The variants and options that the contract is tried with, and what its items share.

Sizes are odd or prime and all different where the maths allows, so that a transposed axis fails.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnzoo.attention import ATTENTION, Attention, StreamingAttention, build_attention
from attnzoo.kvcache.state import State

BATCH, TOKENS, MODEL_DIM = 2, 13, 22
TIGHT = 1e-10
"""Largest difference of two float64 results that differ only in the order of sums, for values of order 1; of larger
ones in proportion: processors sum in different orders."""

Build = Callable[[], Attention]

CASES: dict[str, list[dict[str, Any]]] = {
    "mha": [
        {},
        {"num_kv_heads": 1},
        {"position": "none"},
        {"qkv_bias": True, "output_bias": True},
        {"window": 4},
        {"window": 3, "sinks": 2, "num_kv_heads": 1},
        {"qk_norm": True, "num_kv_heads": 1},
        {"rope_scaling": {"kind": "llama3", "factor": 4.0, "original_max_positions": 64}},
        {"rope_scaling": {"kind": "linear", "factor": 3.0}},
    ],
    "rmha": [
        {},
        {"num_kv_heads": 1},
        {"window": 3, "sinks": 2},
        {"position": "sinusoid"},
        {"position": "sinusoid", "num_kv_heads": 1},
        {"position": "sinusoid", "window": 4, "sinks": 1},
        {"qkv_bias": True, "output_bias": True, "num_kv_heads": 1},
        {"position": "sinusoid", "qkv_bias": True, "output_bias": True},
        {"max_ahead": 5, "num_kv_heads": 1},
    ],
    "mdha": [
        {},
        {"position": "none", "conv_share_heads": True, "conv_bias": True, "conv_init": "uniform"},
        {"num_kv_heads": 1, "conv_width": 4},
        {"window": 1},
        {"qkv_bias": True, "output_bias": True, "conv_bias": True},
    ],
    "rcmha": [
        {},
        {"conv_share_heads": True, "conv_bias": True, "conv_init": "uniform"},
        {"num_kv_heads": 1, "conv_width": 2},
        {"window": 4, "sinks": 3},
        {"max_ahead": 20},
        {"qkv_bias": True, "output_bias": True, "conv_bias": True, "conv_share_heads": True},
    ],
    "linear": [
        {},
        {"normalise": False, "decay": False, "feature_map": "identity"},
        {"normalise": False, "feature_map": "relu", "num_kv_heads": 1},
        {"decay": False, "num_kv_heads": 1},
    ],
    "mesa": [{}, {"num_kv_heads": 1, "ridge": 0.3}],
    "in_context_linear": [{}, {"num_heads": 1, "head_dim": None, "num_queries": 0}],
    "softmax_regression": [{}, {"num_heads": 1, "head_dim": None, "num_queries": 3}],
    "tscan": [{}, {"flavor": "official"}, {"value_dim": 9, "qkv_bias": True, "output_bias": True}],
}
"""Options to test beside the defaults; a variant that is not named here says its own (`Attention.cases`)."""

SIZES = {"model_dim": MODEL_DIM, "num_heads": 3, "head_dim": 14, "max_distance": 7}


def all_cases() -> list[tuple[str, dict[str, Any]]]:
    """(kind, options) of every registered variant, the defaults first."""
    return [(kind, options) for kind in ATTENTION for options in cases_of(kind)]


def cases_of(kind: str) -> list[dict[str, Any]]:
    """Options that are tested; the defaults are whatever else is asked for."""
    asked = [dict(options) for options in CASES.get(kind, ATTENTION.get(kind).cases)]
    return asked if {} in asked else [{}, *asked]


def case_name(kind: str, options: dict[str, Any]) -> str:
    return "-".join([kind, *(f"{key}={value}" for key, value in options.items())])


def build_case(kind: str, options: dict[str, Any], seed: int = 0) -> Attention:
    """The variant at the contract's sizes in float64, every trained parameter random: zero tables would hide
    mistakes."""
    attention = build_sized(kind, options).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in attention.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    return attention


def build_sized(kind: str, options: dict[str, Any]) -> Attention:
    """The variant at the contract's sizes, as its Config has fields for them; without `head_dim`, with a number of
    heads that divides model_dim. Raises AssertionError where nothing can be built."""
    fields = {field.name for field in dataclasses.fields(ATTENTION.get(kind).Config)}
    assert "model_dim" in fields, f"the Config of {kind!r} has no model_dim: make it the first field, without a default"
    sizes = {key: value for key, value in SIZES.items() if key in fields}
    counts = [3] if "head_dim" in fields or "num_heads" not in fields else [2, 11, 1]
    problems = {}
    for count in counts:
        values = sizes | ({"num_heads": count} if "num_heads" in fields else {}) | options
        try:
            return build_attention(kind, values)
        except Exception as error:
            problems[f"{values}"] = error
    said = "; ".join(f"with {values}: {type(error).__name__}: {error}" for values, error in problems.items())
    raise AssertionError(f"{kind!r} cannot be built {said}") from error_of(problems)


def error_of(problems: dict[str, Exception]) -> Exception:
    """The last one, for its traceback."""
    return list(problems.values())[-1]


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_close(actual: Tensor, expected: Tensor, what: str, tolerance: float = TIGHT) -> None:
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} is not {tuple(expected.shape)}"
    for name, tensor in (("result", actual), ("expected", expected)):
        wrong = (~tensor.isfinite()).nonzero().tolist()
        assert not wrong, f"{what}: {len(wrong)} numbers of the {name} are NaN or infinite, first at {wrong[:1]}"
    if not actual.numel():
        return
    error, allowed = (actual - expected).abs().max().item(), tolerance * max(1.0, expected.abs().max().item())
    assert error <= allowed, f"{what}: differs by {error:.3g}, more than {allowed:.3g}"


def streams(attention: Attention) -> bool:
    """Whether there is a streaming form: a token that depends on later ones can never be answered for good."""
    found, said = isinstance(attention, StreamingAttention), attention.traits.streaming
    assert not found or attention.traits.causal
    assert found == (said != "none"), (
        f"traits say streaming={said!r}, and it is{' ' if found else ' no '}StreamingAttention"
    )
    return found


def stream(
    attention: Any, x_BTD: Tensor, cuts: list[int], capacity: int, begin: Callable[[], State] | None = None
) -> Tensor:
    """extend over chunks of the given lengths, from an empty state, or from one that `begin` makes."""
    state = attention.init_state(len(x_BTD), capacity) if begin is None else begin()
    outputs = []
    for chunk in x_BTD.split(cuts, dim=1):
        out, state = attention.extend(chunk, state)
        outputs.append(out)
    return torch.cat(outputs, dim=1)


def gradients(attention: Attention, out: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Gradients of a fixed random functional of `out`, for the input and every parameter that is trained."""
    wanted = {"input": x, **{name: p for name, p in attention.named_parameters() if p.requires_grad}}
    assert out.requires_grad, "the output has no gradient: is it detached, or computed under torch.no_grad()?"
    total = (out * inputs(*out.shape, seed=7)).sum()
    grads = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    unused = [name for name, grad in zip(wanted, grads, strict=True) if grad is None]
    assert not unused, (
        f"{', '.join(unused)}: no part in the output. Use it in this form too (is it detached?), remove it, or keep "
        "what is not trained as a buffer or with requires_grad=False"
    )
    return dict(zip(wanted, grads, strict=True))
