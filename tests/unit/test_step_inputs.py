"""What the layers of one call share: computed once in it, never found again by another."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import attnzoo
from attnzoo.kvcache import build_cache
from attnzoo.models import DecoderConfig, DecoderLM
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.common.step_inputs import Memo, StepInputs, token_of
from tests.helpers.serving import small_model

KINDS = {
    "mha": {"kind": "mha"},
    "gqa": {"kind": "mha", "num_kv_heads": 2},
    "window": {"kind": "mha", "window": 5, "sinks": 1},
    "rcmha": {"kind": "rcmha"},
    "linear": {"kind": "linear"},
}


class Operations(TorchDispatchMode):
    """Counts torch's operations by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def model_of(kind, layers):
    torch.manual_seed(0)
    attention = KINDS[kind] | {"num_heads": 4}
    return DecoderLM(DecoderConfig(vocab_size=61, model_dim=32, num_layers=layers, attention=attention)).double().eval()


def step_operations(kind, layers, cache=None):
    """The operations of one decode step."""
    model, tokens = model_of(kind, layers), torch.arange(36).view(3, 12)
    with torch.inference_mode():
        _, state = model.extend_hidden(tokens[:, :11], model.init_state(3, 12, cache=cache))
        if cache is not None:
            state = model.compress(state, joinable=True)
        with Operations() as found:
            model.extend_hidden(tokens[:, 11:], state)
    return found.counts


def test_values_are_kept_by_function_and_arguments():
    calls = []

    def double(owner, factor):
        calls.append(factor)
        return torch.ones(2) * factor

    first, second = Memo(), Memo()
    assert first.once(double, 2) is first.once(double, 2)
    assert calls == [2]
    assert first.once(double, 3) is not first.once(double, 2)
    assert second.once(double, 2) is not first.once(double, 2)
    assert calls == [2, 3, 2]


SHARED = [
    ("gqa", None, ["sin", "cos"]),
    ("gqa", None, ["where", "masked_fill_"]),
    ("window", None, ["sin", "remainder", "masked_fill_"]),
    ("gqa", {"policy": "streaming", "max_tokens": 8}, ["sin", "remainder"]),
]
"""Operations that no layer needs for itself."""


@pytest.mark.parametrize(("kind", "cache", "shared"), SHARED, ids=lambda value: str(value)[:24])
def test_layers_of_a_step_compute_it_once(kind, cache, shared):
    """Kills: positions, angles, masks, and plans of slots and rings for each layer anew."""
    if cache is not None:
        cache = build_cache(cache["policy"], {"max_tokens": cache["max_tokens"]})
    one, four = (step_operations(kind, layers, cache) for layers in (1, 4))
    assert one["linear"] < four["linear"]
    for name in shared:
        assert one[name] == four[name] > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_step_begins_anew(kind):
    """Kills: positions, masks or slots of a step before."""
    model, tokens = model_of(kind, 3), torch.arange(36).view(3, 12)
    with torch.no_grad():
        whole, _ = model.extend(tokens, model.init_state(3, 12))
        state, parts = model.init_state(3, 12), []
        for first in range(0, 12, 2):
            part, state = model.extend(tokens[:, first : first + 2], state)
            parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", KINDS)
def test_counts_in_one_buffer(kind, mode):
    """A caller may fill the buffer of the counts again for the next call."""
    model, tokens = model_of(kind, 2), torch.arange(10).view(2, 5)
    with mode():
        counts = torch.tensor([2, 5])
        model.extend(tokens, model.init_state(2, 9), counts)
        counts.copy_(torch.tensor([5, 2]))
        out, state = model.extend(tokens, model.init_state(2, 9), counts)
        expected, other = model.extend(tokens, model.init_state(2, 9), torch.tensor([5, 2]))
        assert torch.equal(out[0], expected[0])
        assert torch.equal(model.extend(tokens, state)[0], model.extend(tokens, other)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_alone_is_a_layer_of_a_model(kind):
    """With unequal rows, whether the numbers are known as integers, planned, or only on a device."""
    options = KINDS[kind] | {"model_dim": 16, "num_heads": 4, "dtype": torch.float64}
    layer = attnzoo.attention(options.pop("kind"), **options)
    x, ragged = torch.randn(3, 6, 16, dtype=torch.float64), torch.tensor([6, 1, 4])
    forms = {
        "alone": lambda lengths_B, tokens, counts_B: None,
        "of": StepInputs.of,
        "planned": lambda lengths_B, tokens, counts_B: StepInputs.planned(
            lengths_B.tolist(), tokens, None if counts_B is None else counts_B.tolist()
        ),
        "unknown": lambda lengths_B, tokens, counts_B: StepInputs(lengths_B[:, None] + torch.arange(tokens), counts_B),
    }
    found = {}
    with torch.no_grad():
        for name, form in forms.items():
            state, outputs = layer.init_state(3, 9), []
            for tokens, counts_B in ((6, ragged), (1, None), (2, torch.tensor([2, 0, 1]))):
                step = form(state.lengths_B, tokens, counts_B)
                out, state = layer.extend(x[:, :tokens], state, counts_B, step=step)
                real = range(3) if counts_B is None else counts_B.nonzero()[:, 0]
                outputs += [out[row, : tokens if counts_B is None else counts_B[row]] for row in real]
            found[name] = [*outputs, *state.tensors().values()]
    for name, values in found.items():
        assert all(map(torch.equal, values, found["alone"])), name


def test_a_token_of_a_chunk_alone():
    step = StepInputs.of(torch.tensor([3, 8]), 4, torch.tensor([4, 2]))
    assert step.integers() == ((3, 8), (4, 2))
    third = step.once(token_of, 2)
    assert third is step.once(token_of, 2)
    assert (third.positions_BT.tolist(), third.counts_B.tolist()) == ([[5], [10]], [1, 0])
    assert third.integers() == ((5, 10), (1, 0))
    whole = StepInputs.planned([3, 8], 4)
    third = whole.once(token_of, 2)
    assert (third.positions_BT.tolist(), third.counts_B) == ([[5], [10]], None)


def test_what_is_not_known_is_waited_for():
    step = StepInputs(torch.tensor([[3, 4], [8, 9]]), torch.tensor([2, 1]))
    assert step.known is None
    assert step.integers() == ((3, 8), (2, 1))
    assert step.after().tolist() == [5, 9]


def test_full_counts_are_no_padding():
    """Rows that all get as many tokens have no mask of padding."""
    assert StepInputs.planned([0, 2], 3, [3, 3]).counts_B is None
    assert StepInputs.planned([0, 2], 3, [3, 1]).counts_B.tolist() == [3, 1]


def test_a_step_of_another_state_is_refused():
    model, tokens = small_model("mha"), torch.tensor([[1, 2], [3, 4]])
    state = model.init_state(2, 9)
    with pytest.raises(ValueError, match=r"step begins at \[0, 1\], and the state holds \[0, 0\] tokens"):
        model.extend_hidden(tokens, state, step=StepInputs.planned([0, 1], 2))
    with pytest.raises(ValueError, match=r"step is of \[2, 3\] tokens, not \[2, 2\]"):
        model.extend_hidden(tokens, state, step=StepInputs.planned([0, 0], 3))
    with pytest.raises(ValueError, match="counts_B: step says how many tokens are real; leave counts_B out"):
        model.extend_hidden(tokens, state, torch.tensor([1, 2]), step=StepInputs.planned([0, 0], 2))
    layer, x = model.layers()[0].attention, torch.zeros(2, 2, 32)
    with pytest.raises(ValueError, match=r"step is of \[1, 2\] tokens, and x has \[2, 2\]"):
        layer.extend(x, layer.init_state(2, 9), step=StepInputs.planned([0], 2))


@pytest.mark.parametrize("kind", KINDS)
def test_inference_and_gradients_do_not_meet(kind):
    """What is made in inference mode cannot be saved for a backward pass, and one pass is not kept for the next."""
    model, tokens = model_of(kind, 2), torch.arange(10).view(2, 5)
    with torch.inference_mode():
        expected = model.extend(tokens, model.init_state(2, 5))[0]
    for _ in range(2):
        out, _ = model.extend(tokens, model.init_state(2, 5))
        out.sum().backward()
    torch.testing.assert_close(out, expected.clone(), rtol=1e-9, atol=1e-9)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_only_masks_of_a_step_keep_what_follows_from_them():
    """A mask without positions may live as long as the program."""
    sizes = (1, 6, torch.device("cpu"), torch.float64)
    placed = Mask(query_positions_BT=torch.tensor([[5]]), key_positions_BKS=torch.arange(6)[None, None])
    assert placed.bias(*sizes)[0] is placed.bias(*sizes)[0]
    assert placed.opened(*sizes[:3])[0] is placed.opened(*sizes[:3])[0]
    full = Mask.full()
    assert full.bias(*sizes)[0] is not full.bias(*sizes)[0]
    assert not hasattr(full, "_made")
