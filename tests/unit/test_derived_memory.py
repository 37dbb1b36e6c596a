"""Memory derived from a run without values, against the allocator's records; layers and models are in test_cost.py."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention import Attention, build_attention
from attnzoo.attention.mesa import Mesa, MesaConfig
from attnzoo.attention.mha import MHA
from attnzoo.derived_memory import PassMemory, extrapolated, in_sequence, pass_memory, representative, without_values
from attnzoo.models import DecoderConfig, DecoderLM
from attnzoo.profiling.memory import kept_bytes, peak_bytes

DIM = 48


@torch.library.custom_op("attnzoo_test::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    wide = torch.cat([x] * 9)  # what only the operator's own code shows
    return wide[: len(x)] + wide[len(x) : 2 * len(x)]


doubled.register_fake(torch.empty_like)
doubled.register_autograd(lambda ctx, gradient: doubled(gradient))


class Newcomer(nn.Module):
    """Things that nobody has modelled: branches of one input, constants without a device, a question for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        past = torch.ones(x.shape[1], x.shape[1]).tril()
        mixed = [past @ F.silu(layer(x)) / torch.arange(1, x.shape[1] + 1)[:, None] for layer in self.maps]
        total: Tensor = doubled(torch.stack(mixed).cumsum(0).amax(0))
        return total if float(x.detach().abs().sum()) >= 0 else x


def measured(module: nn.Module, x: Tensor) -> tuple[int, int]:
    """(kept, peak), as the allocator has it."""
    gradient = torch.randn_like(module(x))
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    module(x).backward(gradient)
    x.grad = None
    return kept_bytes(lambda: module(x)), peak_bytes(lambda: module(x).backward(gradient))


def test_code_that_nobody_has_modelled():
    """The sum of the branches' gradients, the operator's inside and what silu's kernel does without, to the byte."""
    module, x = Newcomer(), torch.randn(3, 70, DIM, requires_grad=True)
    memory = pass_memory(module, x)
    assert (memory.kept, memory.peak) == measured(module, x)


def test_gradients_of_one_tensor_are_summed_in_place():
    """Three readers, each with a gradient of the whole tensor: two are held at once, not three."""

    class Readers(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[0] + x[1] + x[2]

    x = torch.randn(60, 300, DIM, requires_grad=True)
    memory = pass_memory(Readers(), x)
    assert (memory.kept, memory.peak) == measured(Readers(), x)
    assert memory.peak < 2.1 * x.nbytes


def test_nothing_of_the_run_remains():
    """Weights and gradients are as before, and shared constants have values: a sinusoid's table outlives its call."""
    attention = build_attention("rmha", {"model_dim": DIM, "position": "sinusoid"})
    before = {name: value.clone() for name, value in attention.state_dict().items()}
    attention.training_memory(1, 333)
    x = torch.randn(1, 333, DIM)
    torch.testing.assert_close(attention(x), attention.reference(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in attention.state_dict().items())
    assert all(parameter.grad is None for parameter in attention.parameters())
    assert not without_values()


def test_code_that_needs_values_is_refused_by_name():
    class Chooser(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[x.sum(-1) > 0])

    with pytest.raises(ValueError, match=r"the memory of Chooser cannot be derived.*write its memory_by_hand"):
        pass_memory(Chooser(DIM, DIM), torch.empty(2, 5, DIM))
    assert not without_values()


def test_frozen_weights_take_no_gradients():
    layer, x = nn.Linear(512, 512), torch.empty(1, 4, 512)
    trained = pass_memory(layer, x)
    layer.requires_grad_(False)
    assert trained.peak - pass_memory(layer, x).peak >= layer.weight.nbytes


def test_a_loop_shows_the_rounds_that_hold_most():
    class Loop(nn.Module):
        rounds = 0

        def forward(self, x: Tensor) -> Tensor:
            for _ in representative(range(50)):
                self.count()
            return x * 2

        def count(self) -> None:
            Loop.rounds += 1

    pass_memory(Loop(), torch.empty(3))
    assert Loop.rounds == 2
    assert list(representative(range(50), largest="last")) == list(range(50))


def test_parts_in_sequence():
    """The second part begins with what the first one keeps; its backward pass is over when the first one's begins."""
    first = PassMemory(kept=10, forward=15, backward=40)
    second = PassMemory(kept=20, forward=21, backward=25)
    assert in_sequence([first, second]) == PassMemory(kept=30, forward=31, backward=40)
    assert in_sequence([second, first]) == PassMemory(kept=30, forward=35, backward=60)
    assert in_sequence([second, first]).workspace == 30


def test_memory_by_hand_stands_for_a_layer():
    """Of a variant whose code cannot run without values; the rest of the model is derived around it."""

    class Written(MHA):
        def forward(self, x_BTD: Tensor, **what: Any) -> Tensor:
            raise NotImplementedError

        def memory_by_hand(self, batch: int, tokens: int, dtype: torch.dtype) -> PassMemory:
            return PassMemory(kept=10_000_000, forward=11_000_000, backward=30_000_000)

    model = DecoderLM(DecoderConfig(vocab_size=64, model_dim=DIM, num_layers=2, attention="mha"))
    derived = model.training_memory(2, 100)
    for block in model.layers():
        layer: Attention = Written(block.attention.config)
        assert layer.training_memory(2, 100).peak == 30_000_000
        derived_kept = block.attention.training_memory(2, 100).kept
        block.attention = layer
    written = model.training_memory(2, 100)
    assert written.kept - derived.kept == 2 * (10_000_000 - derived_kept)
    assert written.workspace == pytest.approx(20_000_000, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "batch", "tokens"), [(128, 1, 12301), (128, 3, 6007), (48, 1, 22451), (320, 1, 7333)])
def test_a_mesa_layer_over_many_blocks(dim: int, batch: int, tokens: int):
    """Past the length from which linear attention works block by block, too."""
    mesa = Mesa(MesaConfig(model_dim=dim))
    line, followed = mesa.training_memory(batch, tokens), mesa.derived_memory(batch, tokens, torch.float32)
    assert line.kept == followed.kept
    assert line.forward == pytest.approx(followed.forward, rel=0.03)
    assert line.backward == pytest.approx(followed.backward, rel=0.03)


def test_a_straight_line_through_few_blocks():
    """Memory over many blocks, which would take long to follow, from few."""
    asked: list[int] = []

    def derive(tokens: int) -> PassMemory:
        asked.append(tokens)
        return PassMemory(kept=tokens, forward=2 * tokens, backward=3 * tokens + 7)

    assert extrapolated(derive, 1003, 10) == PassMemory(kept=1003, forward=2006, backward=3016)
    assert asked == [23, 33]
    assert extrapolated(derive, 30, 10).kept == 30
