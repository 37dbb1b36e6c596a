"""A plain module as a variant: its options, what it may not be, and what is made around it."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

import attnzoo
from attnzoo.attention import ATTENTION, attention, slow_streaming
from attnzoo.attention.edits import Edits, Map, TokenLayout, layer_sizes
from attnzoo.attention.forward_only import as_variant
from attnzoo.cli.variants import describe, list_variants
from attnzoo.kvcache import build_cache
from attnzoo.models import DecoderConfig, DecoderLM, build_shapes
from attnzoo.ops.common.masks import Mask
from attnzoo.planner.serving import exact_caches
from tests.contract.caches import check_registered
from tests.contract.cases import inputs
from tests.helpers.plain_modules import Future, Mine, registered, variant_of


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    with registered():
        yield


def test_what_is_made_of_a_module():
    assert ATTENTION.register("mine_plain")(Mine) is Mine  # the class stays what it is
    layer = attnzoo.attention("mine_plain", model_dim=6, gain=2)
    assert layer.config == type(layer).Config(model_dim=6, gain=2.0)
    assert [f.name for f in dataclasses.fields(layer.config)] == ["model_dim", "gain"]
    assert type(layer).source == "a dream"
    assert set(layer.state_dict()) == {f"module.{name}" for name in layer.module.state_dict()}
    assert layer.traits.streaming == "recomputed"
    with pytest.raises(ValueError, match="gain='2' has type str; it must be float"):
        attention("mine_plain", model_dim=6, gain="2")
    with pytest.raises(ValueError, match=r"unknown key mine_plain\.gian; did you mean 'gain'"):
        attention("mine_plain", model_dim=6, gian=2.0)


def test_it_is_described_with_the_way_to_make_it_fast():
    said = slow_streaming(variant_of(Mine))
    assert "its forward runs over all tokens so far for every new one" in said
    text = describe("mine_plain", {"model_dim": 16}, 100, "float32")
    assert said in text
    assert "streaming=recomputed" in text
    assert slow_streaming("mha") is None
    assert "One head that looks back." in list_variants(16, 10)[0]
    config = DecoderConfig(vocab_size=9, model_dim=8, num_layers=4, attention=["mha", "mine_plain"])
    assert config.slow_streaming() == [said]


def test_masks_and_contexts_reach_a_forward_that_takes_them():
    given = []

    class Takes(Mine):
        masks = ("causal", "full", "keys", "starts")

        def forward(self, x, *, context=None, mask=None):
            given.append((context, mask))
            return super().forward(x)

    layer = attention(variant_of(Takes), model_dim=6)
    x, starts = inputs(2, 4, 6).float(), torch.zeros(2, 4, dtype=torch.int64)
    given.clear()
    layer(x)
    layer(x, mask=Mask(starts_BT=starts))
    layer(x, context_BSD=x)
    assert [(context is None, mask.causal, mask.starts_BT is starts) for context, mask in given] == [
        (True, True, False),
        (True, True, True),
        (False, False, False),
    ]
    assert layer.traits.varlen
    with pytest.raises(ValueError, match="mask: Takes cannot compute pairs"):
        layer(x, mask=Mask(pairs=torch.ones(2, 4, 4, dtype=torch.bool)))
    exists = torch.tensor([[True, False, True, True]] * 2)
    _, state = layer.extend(x[:, :2], layer.init_context(x, exists))
    assert torch.equal(given[-1][0], x.masked_fill(~exists[..., None], 0.0))
    assert torch.equal(given[-1][1].keys_BS, exists)
    assert torch.equal(state.exists_BS, exists)


class WrongShape(Mine):
    def forward(self, x):
        return super().forward(x)[:, :1]


class Pair(Mine):
    def forward(self, x):
        return super().forward(x), None


class EvenOnly(Mine):
    def forward(self, x):
        return super().forward(x.unflatten(1, (-1, 2)).flatten(1, 2))


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (WrongShape, r"WrongShape.forward returned \[2, 1, 6\] for x of \[2, 37, 6\]; it must return one tensor"),
        (Pair, r"Pair.forward returned tuple for x of \[2, 37, 6\]"),
        (EvenOnly, r"EvenOnly.forward fails on x of \[2, 37, 6\]: RuntimeError: .*any number of tokens from 1 on"),
    ],
)
def test_an_output_that_is_none_is_named(cls, message):
    """Where it has weights, and where it is described, which builds no weights of its own. Kills: a trial of causal
    modules alone; a description of shapes."""
    kind = variant_of(cls)
    with pytest.raises(ValueError, match=message):
        attention(kind, model_dim=6)
    with pytest.raises(ValueError, match=message):
        describe(kind, {"model_dim": 6}, 100, "float32")


def test_what_is_described_is_tried():
    """Also where it is not causal, and, without values, where it is too large to be built."""
    with pytest.raises(ValueError, match=r"Future\.forward sees the future"):
        describe(variant_of(Future), {"model_dim": 6}, 100, "float32")

    class Ahead(Pair):
        causal = False

    kind = variant_of(Ahead, "ahead")
    for build in (lambda: attention(kind, model_dim=6), lambda: describe(kind, {"model_dim": 6}, 9, "float32")):
        with pytest.raises(ValueError, match=r"Ahead.forward returned tuple for x of \[2, 37, 6\]"):
            build()
    with pytest.raises(ValueError, match=r"Ahead.forward returned tuple for x of \[1, 9, 8192\]"):
        describe(kind, {"model_dim": 8192}, 9, "float32")

    class Patches(Mine):
        """For images of 9 patches."""

        causal = False

        def __init__(self, model_dim: int):
            super().__init__(model_dim)
            self.places = nn.Parameter(torch.zeros(9, model_dim))

        def forward(self, x):
            return super().forward(x + self.places)

    assert attention(variant_of(Patches, "patches"), model_dim=6)(torch.zeros(1, 9, 6)).shape == (1, 9, 6)


@pytest.mark.parametrize("name", ["slopes", "_mask", "several", "inner.table"])
def test_a_tensor_that_is_neither_parameter_nor_buffer_is_refused_when_it_is_built(name):
    class Keeps(Mine):
        def __init__(self, model_dim: int):
            super().__init__(model_dim)
            self.inner = nn.GRU(2, 2)  # keeps its parameters in a list as well
            owner, _, last = name.rpartition(".")
            value = {"a": torch.ones(2)} if last == "several" else torch.ones(2)
            setattr(self.get_submodule(owner), last, value)

    kind, last = variant_of(Keeps), name.rpartition(".")[2]
    config = DecoderConfig(vocab_size=9, model_dim=6, num_layers=1, attention=kind, tie_embeddings=False)
    for build in (lambda: attention(kind, model_dim=6), lambda: DecoderLM(config), lambda: build_shapes(config)):
        with pytest.raises(
            ValueError, match=rf"'mine_plain' keeps {name}, .*write self.register_buffer\('{last}', ...\)"
        ):
            build()


def test_random_numbers_that_no_checkpoint_holds_are_refused_when_they_are_drawn():
    """Kills: a buffer that loading draws anew."""

    class Draws(Mine):
        def __init__(self, model_dim: int, seed: int = -1):
            super().__init__(model_dim)
            source = torch.Generator().manual_seed(seed) if seed >= 0 else None
            self.register_buffer("features", torch.randn(model_dim, generator=source), persistent=False)
            self.register_buffer("unknown", torch.full((2,), torch.nan), persistent=False)

    kind = variant_of(Draws)
    config = DecoderConfig(vocab_size=9, model_dim=6, num_layers=1, attention=kind, tie_embeddings=False)
    for build in (lambda: attention(kind, model_dim=6), lambda: DecoderLM(config)):
        with pytest.raises(ValueError, match=r"the buffer features with persistent=False.*a seed of its own"):
            build()
    torch.manual_seed(3)
    expected = (Draws(6, 5), torch.rand(2))[1]
    torch.manual_seed(3)
    attention(kind, model_dim=6, seed=5)
    assert torch.equal(torch.rand(2), expected)  # looking at it again draws nothing


def test_the_reference_is_forward_in_float64_unless_it_is_written():
    layer = attention(variant_of(Mine), model_dim=6).bfloat16()
    x = inputs(2, 5, 6).bfloat16()
    exact = attention("mine_plain", model_dim=6).double()
    exact.load_state_dict(layer.state_dict())
    assert torch.equal(layer.reference(x), exact(x.double()).bfloat16())
    assert not torch.equal(layer(x), layer.reference(x))
    assert torch.autograd.grad(layer.reference(x).sum(), layer.module.qkv.weight)[0].abs().sum() > 0

    class Written(Mine):
        def reference(self, x):
            return torch.zeros_like(x)

    assert not attention(variant_of(Written, "written"), model_dim=6).reference(inputs(1, 2, 6).float()).any()


def test_flops_are_counted_written_or_asked_for():
    cost = attention(variant_of(Mine), model_dim=6).cost(2, 1, 5)
    assert cost.flops == 2 * 2 * 5 * (6 * 18 + 6 * 6) + 4 * 2 * 5 * 5 * 6
    assert cost.state_bytes == 2 * (5 * 6 * 4 + 8)
    assert cost.parameters == 6 * 18 + 18 + 6 * 6 + 6
    assert cost.bytes_moved == 4 * cost.parameters + cost.state_bytes + 2 * 2 * 6 * 4

    class Written(Mine):
        def flops(self, batch, tokens):
            return 1000 * batch + tokens

    assert attention(variant_of(Written, "written"), model_dim=6).cost(2, 1, 5).flops == 2005

    class Chooses(Mine):
        def forward(self, x):
            return super().forward(x) if bool(x.sum() > -1e9) else x

    with pytest.raises(ValueError, match=r"FLOPs of Chooses cannot be counted.*write its flops\(batch, tokens\)"):
        attention(variant_of(Chooses, "chooses"), model_dim=6).cost(1, 1, 5)


def test_no_cache_can_compress_inputs():
    layer = attention(variant_of(Mine), model_dim=6)
    with pytest.raises(ValueError, match="cache: Mine keeps a state of its own, the inputs of its forward"):
        layer.init_state(1, 4, cache=build_cache("streaming", {}))
    config = DecoderConfig(vocab_size=9, model_dim=6, num_layers=1, attention="mine_plain")
    with pytest.raises(ValueError, match="Mine keeps a state of its own"):
        DecoderLM(config).init_state(1, 4, cache=build_cache("d2o", {}))
    assert exact_caches(DecoderLM(config), 10) == {"state of its own": 10 * 6 * 4 + 8}
    check_registered("mine_plain", {})  # the contract hears the same refusal


def test_what_a_forward_computes_inside_is_neither_read_nor_edited():
    layer = attention(variant_of(Mine), model_dim=6)
    with pytest.raises(
        ValueError, match=r"Mine.*it computes its attention by itself, not by attnzoo\.attention\.parts"
    ):
        Edits(Map()).plan([layer_sizes(layer)], TokenLayout(4), 0)


def test_a_module_without_weights_follows_the_layer():
    class Mean(nn.Module):
        def __init__(self, model_dim: int):
            super().__init__()

        def forward(self, x):
            return x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)[:, None]

    layer = attention(variant_of(Mean), model_dim=6).double()
    x = inputs(2, 4, 6)
    out, state = layer.extend(x, layer.init_state(2, 4))
    assert state.inputs_BTD.dtype == torch.float64
    torch.testing.assert_close(out, layer(x), rtol=0, atol=0)
    assert not layer.state_dict()


def test_a_state_grows_and_joins():
    layer = attention(variant_of(Mine), model_dim=6).double().requires_grad_(False)
    x = inputs(2, 9, 6)
    _, long = layer.extend(x[:1, :7], layer.init_state(1, 2))
    _, short = layer.extend(x[1:, :2], layer.init_state(1, 2))
    out, state = layer.extend(x[:, 7:], long.cut(7).joined(short))
    torch.testing.assert_close(out[0], layer(x[:1])[0, 7:], rtol=0, atol=1e-12)
    alone = torch.cat([x[1:, :2], x[1:, 7:]], dim=1)
    torch.testing.assert_close(out[1], layer(alone)[0, 2:], rtol=0, atol=1e-12)
    assert state.lengths_B.tolist() == [9, 4]


def test_a_formula_by_hand_has_the_modules_own_names():
    class Scaled(nn.Module):
        def __init__(self, model_dim: int):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(model_dim))

        def forward(self, x):
            return x * self.scale

        @staticmethod
        def by_hand(config, weights, x_TD):
            return x_TD * weights["scale"] + 0 * config.model_dim

    cls = as_variant(Scaled)
    found = cls.by_hand(cls.Config(model_dim=2), {"module.scale": np.array([2.0, 3.0])}, np.ones((1, 2)))
    assert found.tolist() == [[2.0, 3.0]]


def test_reset_parameters_with_two_numbers_is_asked():
    class Draws(Mine):
        def reset_parameters(self, std, output_std):
            nn.init.constant_(self.qkv.weight, std)
            nn.init.constant_(self.out.weight, output_std)

    config = DecoderConfig(vocab_size=9, model_dim=6, num_layers=2, attention=variant_of(Draws), init_std=0.5)
    module = DecoderLM(config).layers()[0].attention.module
    assert (module.qkv.weight == 0.5).all()
    assert (module.out.weight == 0.25).all()
