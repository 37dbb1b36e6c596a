"""What the class of a plain module must say to be a variant: options, forward, source."""

from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from torch import nn

from attnzoo.attention import ATTENTION, attention
from attnzoo.attention.forward_only import as_variant
from attnzoo.attention.signature import NO_SOURCE
from tests.helpers.plain_modules import Mine, registered, variant_of


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    with registered():
        yield


def test_where_the_source_is_said():
    class Given(Mine):
        source = "Doe 2026"

    class Silent(Mine):
        """No word."""

    Silent.__module__ = "nowhere"
    assert as_variant(Given).source == "Doe 2026"
    assert as_variant(Silent).source == NO_SOURCE


def init(signature: str) -> type[nn.Module]:
    """Mine with another `__init__`."""
    scope: dict[str, Any] = {"Mine": Mine, "torch": torch, "Literal": Literal, "nn": nn}
    exec(f"class Other(Mine):\n    def __init__(self, {signature}):\n        Mine.__init__(self, model_dim)", scope)
    return scope["Other"]


@pytest.mark.parametrize(
    ("signature", "message"),
    [
        ("config", "__init__ takes config first; it must be model_dim: int"),
        ("dim: int, model_dim: int = 2", "__init__ takes dim first; it must be model_dim: int"),
        ("model_dim", "model_dim must be annotated as int"),
        ("model_dim: float", "model_dim must be annotated as int"),
        ("model_dim: int, heads=4", "heads has no type; write for example heads: int = 4"),
        ("model_dim: int, heads: int", "heads has no default; give one, such as heads: int = ..."),
        ("model_dim: int, heads: int = '4'", "heads='4' has type str; it must be int"),
        ("model_dim: int, dtype: torch.dtype = torch.float32", "dtype is a dtype, which no configuration file holds"),
        (
            "model_dim: int, norm: 'nn.Module | None' = None",
            "norm is a nn.modules.module.Module | None|norm is a torch",
        ),
        ("model_dim: int, kind: 'Strange' = None", "has a parameter of an unknown type: name 'Strange'"),
        ("model_dim: int, **options: int", r"takes \*\*options: int: name each option"),
        ("model_dim: int, *sizes: int", r"takes \*sizes: int: name each option"),
        ("model_dim: int, /", "model_dim cannot be given by its name"),
    ],
)
def test_a_signature_that_says_no_options_is_refused(signature, message):
    with pytest.raises(ValueError, match=f"^attention 'mine_plain': Other.*({message})"):
        variant_of(init(signature))
    assert "mine_plain" not in ATTENTION


def test_options_of_every_kind_reach_the_module():
    signature = (
        "model_dim: int, a: bool = True, b: float | None = None, c: Literal['x', 'y'] = 'x', "
        "d: tuple[int, ...] = (1, 2), e: list[int] = [3], *, f: 'dict[str, float]' = {}"
    )
    layer = attention(variant_of(init(signature)), model_dim=4, b=2, d=[5])
    assert layer.config.b == 2.0
    assert layer.config.d == (5,)
    assert layer.config.e == [3]
    with pytest.raises(ValueError, match="c='z' is not one of 'x', 'y'"):
        attention("mine_plain", model_dim=4, c="z")


class NoForward(nn.Module):
    def __init__(self, model_dim: int):
        super().__init__()


class TwoInputs(Mine):
    def forward(self, x, y):
        return x + y


class ContextAlone(Mine):
    def forward(self, x, context):
        return x + context


class OddMasks(Mine):
    masks = ("keys", "window")

    def forward(self, x, mask):
        return x


class SomeCausal(Mine):
    causal = "no"


class Extends(Mine):
    def extend(self, x, state):
        return x, state


class Costs(Mine):
    cost = 3


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (NoForward, "NoForward has no forward"),
        (TwoInputs, "TwoInputs.forward must take x .* and beside it only mask, context, and what has a default .*'y'"),
        (ContextAlone, "ContextAlone.forward takes context without mask, which says what of it exists: add mask=None"),
        (OddMasks, r"OddMasks.masks=\['keys', 'window'\] must hold \['causal'\] and be of \['causal', 'full', 'keys'"),
        (SomeCausal, "SomeCausal.causal is 'no'; it must be True or False"),
        (Extends, r"Extends.extend would not be used: .* Make it a StreamingAttention \(attnzoo.attention\)"),
        (Costs, "Costs.cost would not be used"),
        (int, "int is no subclass of Attention; .*or an nn.Module with forward"),
    ],
)
def test_a_class_that_is_no_variant_is_refused(cls, message):
    with pytest.raises(ValueError, match=f"^attention 'mine_plain': {message}"):
        variant_of(cls)


def test_what_torch_gives_its_own_containers_is_not_meant():
    class Chain(nn.Sequential):
        def __init__(self, model_dim: int):
            super().__init__(nn.Linear(model_dim, model_dim), nn.Tanh())

    assert hasattr(Chain, "extend")
    assert attention(variant_of(Chain), model_dim=6).traits.streaming == "recomputed"
