"""Options of variants: what is refused, in what words, and that it is the same from a file and from Python."""

import dataclasses
import math

import pytest
import torch

import attnzoo
from attnzoo.attention import ATTENTION, build_attention
from attnzoo.types import LARGEST
from tests.contract.cases import BATCH, MODEL_DIM, TOKENS, build_case, inputs

INTEGERS = [
    (kind, field.name)
    for kind in ATTENTION
    for field in dataclasses.fields(ATTENTION.get(kind).Config)
    if "int" in str(field.type)
]
FLOATS = [
    (kind, field.name)
    for kind in ATTENTION
    for field in dataclasses.fields(ATTENTION.get(kind).Config)
    if "float" in str(field.type)
]


def refused(kind: str, field: str, value: object) -> None:
    """By `build_attention` and by the Config itself, both times naming field and value."""
    values = {"model_dim": 64} | {field: value}
    shown = repr(value) if not isinstance(value, float) else str(value)
    for build in (
        lambda: build_attention(kind, values),
        lambda: ATTENTION.get(kind)(ATTENTION.get(kind).Config(**values)),
    ):
        with pytest.raises(ValueError, match=f"{field}.*") as error:
            build()
        assert shown in str(error.value)


@pytest.mark.parametrize("value", [-1, True, 2.0, "8", [4], 2**31, 2**70, -(2**70)], ids=repr)
@pytest.mark.parametrize(("kind", "field"), INTEGERS)
def test_integers(kind, field, value):
    refused(kind, field, value)


@pytest.mark.parametrize(
    "field", ["model_dim", "num_heads", "num_kv_heads", "head_dim", "window", "max_distance", "conv_width"]
)
def test_no_size_is_zero(field):
    kinds = [kind for kind, name in INTEGERS if name == field]
    assert kinds
    for kind in kinds:
        refused(kind, field, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1e-6 m", True, 10**400], ids=lambda v: str(v)[:8])
@pytest.mark.parametrize(("kind", "field"), FLOATS)
def test_floats(kind, field, value):
    if isinstance(value, int) and not isinstance(value, bool):
        with pytest.raises(ValueError, match=f"{field}=inf must be a finite number"):
            build_attention(kind, {"model_dim": 64, field: value})
        return
    refused(kind, field, value)


def test_sinks_are_counted_only_with_a_window():
    with pytest.raises(ValueError, match="sinks=3 without a window"):
        build_attention("mha", {"model_dim": 64, "sinks": 3})


def test_sizes_that_do_not_fit_into_memory():
    with pytest.raises(ValueError, match=r"'linear' with model_dim=2147483647.* does not fit into memory; make it"):
        build_attention("linear", {"model_dim": LARGEST, "num_heads": 1})


def test_the_largest_window_is_a_window():
    attention = build_attention("mha", {"model_dim": 16, "window": LARGEST, "sinks": 5}).double()
    plain = build_attention("mha", {"model_dim": 16}).double()
    plain.load_state_dict(attention.state_dict())
    x = inputs(BATCH, TOKENS, 16)
    with torch.no_grad():
        torch.testing.assert_close(attention(x), plain(x), rtol=0, atol=1e-12)
        streamed, _ = attention.extend(x, attention.init_state(BATCH, TOKENS))
    torch.testing.assert_close(streamed, plain(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "shape", [(TOKENS, MODEL_DIM), (BATCH, TOKENS, MODEL_DIM + 1), (1, BATCH, TOKENS, MODEL_DIM)], ids=str
)
def test_inputs_of_another_shape(shape):
    attention = build_case("rcmha", {})
    for call in (attention, attention.reference, lambda x: attention.extend(x, attention.init_state(BATCH, TOKENS))):
        with pytest.raises(ValueError, match=r"RCMHA got x of shape .*; it must be \[batch, tokens, 22\]"):
            call(inputs(*shape))
    with pytest.raises(ValueError, match=r"InContextLinear got x of shape .*; it must be \[batch, tokens, 22\]"):
        build_case("in_context_linear", {})(inputs(*shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.int8}, "unknown dtype torch.int8"),
        ({"dtype": torch.complex64}, "unknown dtype torch.complex64"),
        ({"dtype": torch.float8_e4m3fn}, "unknown dtype torch.float8_e4m3fn"),
        ({"dtype": float}, "unknown dtype <class 'float'>"),
        ({"device": "abacus"}, "device='abacus' cannot be used on this machine"),
        ({"device": "cuda:99"}, "device='cuda:99' cannot be used on this machine"),
        ({"device": []}, r"device=\[\] has type list"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_dtypes_and_devices_that_no_layer_can_have(options, message):
    with pytest.raises(ValueError, match=message):
        attnzoo.attention("mha", model_dim=16, **options)
    empty = attnzoo.attention("mha", model_dim=16, device="meta", dtype=torch.float64)
    assert empty.projection.query.weight.is_meta
    with pytest.raises(ValueError, match="no weights"):
        empty(torch.zeros(1, 3, 16))


def test_a_state_of_another_variant_is_no_state_of_this_one():
    """Else a convolution would begin anew with every chunk, without a word."""
    x = torch.randn(1, 3, 16)
    for kind, other in (("rcmha", "rmha"), ("mha", "mdha")):
        state = attnzoo.attention(other, model_dim=16).init_state(1, 8)
        with pytest.raises(ValueError, match=r"state of another variant, which remembers (no|a) convolution"):
            attnzoo.attention(kind, model_dim=16).extend(x, state)
