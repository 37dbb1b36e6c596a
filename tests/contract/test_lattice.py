"""The variants are one family: switched-off parts leave the simpler variant, and weights carry over."""

import pytest
import torch

from attnzoo.attention import Attention
from tests.contract.cases import BATCH, MODEL_DIM, TOKENS, assert_close, build_case, inputs


def delta_kernels(attention: Attention) -> None:
    """Convolutions that pass the current token through."""
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            if name.startswith("conv."):
                parameter.zero_()
                if name.endswith("_kernel"):
                    parameter[..., -1] = 1.0


def zero_tables(attention: Attention) -> None:
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            if name.startswith("mixing.position."):
                parameter.zero_()


def carry_over(source: Attention, target: Attention) -> None:
    """Copies every weight of the same name; what the target has alone keeps its value."""
    weights = source.state_dict()
    missing, unexpected = target.load_state_dict(
        {name: tensor for name, tensor in weights.items() if name in target.state_dict()}, strict=False
    )
    assert not unexpected
    assert all(name.startswith(("conv.", "mixing.position.", "projection.value.bias")) for name in missing)


@pytest.mark.parametrize(
    ("rich", "rich_options", "plain", "plain_options", "reductions"),
    [
        ("rcmha", {}, "rmha", {}, [delta_kernels]),
        ("mdha", {}, "mha", {}, [delta_kernels]),
        ("mdha", {"position": "none"}, "mha", {"position": "none"}, [delta_kernels]),
        ("rmha", {}, "mha", {"position": "none", "qkv_bias": True}, [zero_tables]),
        ("rmha", {"position": "sinusoid"}, "mha", {"position": "none"}, [zero_tables]),
        ("rcmha", {}, "mha", {"position": "none", "qkv_bias": True}, [delta_kernels, zero_tables]),
    ],
)
def test_reduction(rich, rich_options, plain, plain_options, reductions):
    simple, full = build_case(plain, plain_options), build_case(rich, rich_options)
    if plain_options.get("qkv_bias"):  # of the three biases the table form has only the value's
        torch.nn.init.zeros_(simple.projection.query.bias)
        torch.nn.init.zeros_(simple.projection.key.bias)
    carry_over(simple, full)
    for reduce in reductions:
        reduce(full)
    x = inputs(BATCH, TOKENS, MODEL_DIM)
    with torch.no_grad():
        assert_close(full(x), simple(x), f"{rich} reduced to {plain}")


def test_one_kv_head_equals_its_copies():
    grouped, full = build_case("mha", {"num_kv_heads": 1}), build_case("mha", {})
    with torch.no_grad():
        for name in ("key", "value"):
            getattr(full.projection, name).weight.copy_(getattr(grouped.projection, name).weight.repeat(3, 1))
        for name in ("query", "output"):
            getattr(full.projection, name).weight.copy_(getattr(grouped.projection, name).weight)
        x = inputs(BATCH, TOKENS, MODEL_DIM)
        assert_close(grouped(x), full(x), "one kv head against three equal ones")
