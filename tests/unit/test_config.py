"""Registries and strict configs: what is wrong is named, with the way out."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

from attnzoo.attention.mha import MHAConfig
from attnzoo.errors import suggest
from attnzoo.models import DecoderConfig
from attnzoo.registry import Registry
from attnzoo.types import CheckedConfig, build_config, parse_dtype


@dataclass(frozen=True)
class Sizes:
    width: int
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"
    depth: int | None = None
    on: bool = False


def test_suggest():
    assert suggest("rmah", ["mha", "rmha"]) == "; did you mean 'rmha'? known: mha, rmha"
    assert suggest("xyz", ["mha"]) == "; known: mha"
    assert suggest("xyz", []) == "; there are none"
    days = [f"p03 2020-01-{day:03d}" for day in range(1000)]
    told = suggest("p03 2020-01-0077", days)  # no message of thousands of names
    assert told.startswith("; did you mean 'p03 2020-01-077'? known: p03 2020-01-000, ")
    assert told.endswith(", p03 2020-01-009, ... (1,000 in all)")


def test_registry():
    shapes: Registry[type] = Registry("shape")

    @shapes.register("square")
    class Square:
        pass

    assert shapes.get("square") is Square
    assert shapes.name_of(Square) == "square"
    assert list(shapes) == shapes.names() == ["square"]
    with pytest.raises(ValueError, match="unknown shape 'sqare'; did you mean 'square'"):
        shapes.get("sqare")
    with pytest.raises(ValueError, match="shape name 'square' is taken"):
        shapes.register("square")(int)
    with pytest.raises(ValueError, match="is not a registered shape"):
        shapes.name_of(int)
    for name in ("two words", "", Square):
        with pytest.raises(ValueError, match="give a word without spaces"):
            shapes.register(name)
    shapes.remove("square")
    assert "square" not in shapes


def test_a_registry_that_loads_more_when_first_asked():
    """What fails is told to whoever asks, every time until it succeeds."""
    shapes: Registry[int] = Registry("shape")
    attempts = []

    def load() -> None:
        attempts.append(1)
        if len(attempts) < 3:
            raise ValueError("no file")
        shapes.register("round")(1)

    shapes.load_first(load)
    for look_up in (shapes.names, lambda: shapes.get("round")):
        with pytest.raises(ValueError, match="no file"):
            look_up()
    assert shapes.get("round") == 1
    assert "round" in shapes
    assert len(attempts) == 3


def test_build_config_accepts():
    assert build_config(Sizes, {"width": 3, "rate": 1, "depth": None}, "sizes") == Sizes(3, 1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"sizes.width is missing: set it to a value of type int$"),
        ({"width": 3, "widht": 4}, r"unknown key sizes.widht; did you mean 'width'"),
        ({"width": "3"}, r"sizes.width='3' has type str; it must be int"),
        ({"width": True}, r"sizes.width=True has type bool"),
        ({"width": 3.0}, r"sizes.width=3.0 has type float"),
        ({"width": 3, "kind": "c"}, r"sizes.kind='c' is not one of 'a', 'b'"),
        ({"width": 3, "depth": "x"}, r"sizes.depth='x' has type str; it must be int or NoneType"),
        ({"width": 3, "on": 1}, r"sizes.on=1 has type int; it must be bool"),
    ],
)
def test_build_config_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        build_config(Sizes, values, "sizes")


def test_a_default_without_a_type_is_refused():
    with pytest.raises(
        ValueError, match=r"Mine.num_heads = 4 has no type, so it is no option; .*example num_heads: int = 4"
    ):

        class Mine(CheckedConfig):
            model_dim: int
            num_heads = 4

    with pytest.raises(ValueError, match=r"Theirs.window = None has no type.*example window: int \| None = None"):

        class Theirs(MHAConfig):
            window = None

    class Fine(CheckedConfig):
        model_dim: int
        SIZES: ClassVar[tuple[int, ...]] = (1, 2)
        _hidden = 3

        def heads(self) -> int:
            return 1

    assert dataclass(frozen=True, kw_only=True)(Fine)(model_dim=3).heads() == 1


def test_parse_dtype():
    with pytest.raises(ValueError, match="unknown dtype 'bf61'; did you mean 'bf16'"):
        parse_dtype("bf61")


BASE = {"vocab_size": 50, "model_dim": 32, "num_layers": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "rcmah"}, "unknown attention 'rcmah'; did you mean 'rcmha'"),
        ({"attention": ["mha", "linear", "rmha"]}, "lists 3 variants, which does not divide num_layers=4"),
        ({"attention": []}, "names no variant"),
        ({"attention": {"num_heads": 4}}, "with `kind: <name>`"),
        (
            {"attention": {"kind": "mha", "num_hads": 4}},
            r"unknown key model.attention.num_hads; did you mean 'num_heads'",
        ),
        ({"attention": ["mha", {"kind": "mha", "num_hads": 4}]}, r"unknown key model.attention\[1\].num_hads"),
        ({"attention": {"kind": "mha", "model_dim": 4}}, "model_dim is the model's own"),
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"mlp": "silu"}, "model.mlp='silu' is not one of"),
        ({"mlp_dim": 0}, "mlp_dim=0"),
        ({"init_std": 0.0}, "init_std=0.0 must be a positive number"),
        ({"embedding_std": -1.0}, "embedding_std=-1.0 must be a positive number"),
        ({"vocabsize": 3}, "unknown key model.vocabsize; did you mean 'vocab_size'"),
    ],
)
def test_decoder_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_dict(BASE | changes)


def test_decoder_config_round_trip():
    config = DecoderConfig.from_dict(BASE | {"attention": ["rcmha", {"kind": "linear", "num_heads": 2}]})
    assert DecoderConfig.from_dict(config.to_dict()) == config
    assert config.layer_attention(2) == ("rcmha", {"model_dim": 32, "max_distance": 256})
    assert config.layer_attention(3) == ("linear", {"model_dim": 32, "num_heads": 2})
