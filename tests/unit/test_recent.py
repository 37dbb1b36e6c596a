"""What layers share: found again by the same tensors and equal values, never by anything else."""

import pytest
import torch

import attnzoo
from attnzoo.ops.common.recent import KEPT, recent


def counted():
    calls = []

    @recent
    def double(x, factor):
        calls.append(factor)
        return x * factor

    return double, calls


def test_the_same_tensor_is_computed_once():
    double, calls = counted()
    x, equal = torch.ones(2), torch.ones(2)
    with torch.no_grad():
        assert double(x, 2) is double(x, 2)
        assert calls == [2]
        assert double(x, 3) is not double(equal, 3)
    assert calls == [2, 3, 3]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_written_to_is_computed_again(mode):
    """Kills: results of counts that a caller keeps in one buffer."""
    double, calls = counted()
    with mode():
        counts = torch.tensor([2, 5])
        assert double(counts, 2).tolist() == double(counts, 2).tolist() == [4, 10]
        counts.copy_(torch.tensor([5, 2]))
        assert double(counts, 2).tolist() == [10, 4]
    assert calls == [2, 2]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["mha", "rmha", "rcmha", "mdha"])
def test_counts_in_one_buffer(kind, mode):
    """Of a layer, in its outputs and in what its state has become."""
    layer = attnzoo.attention(kind, model_dim=16, num_heads=2, dtype=torch.float64)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    with mode():
        counts = torch.tensor([2, 5])
        layer.extend(x, layer.init_state(2, 9), counts)
        counts.copy_(torch.tensor([5, 2]))
        out, state = layer.extend(x, layer.init_state(2, 9), counts)
        expected, other = layer.extend(x, layer.init_state(2, 9), counts.clone())
        assert torch.equal(out[0], expected[0])
        assert torch.equal(layer.extend(x, state)[0], layer.extend(x, other)[0])


def test_only_the_last_results_are_kept():
    double, calls = counted()
    tensors = [torch.ones(1) for _ in range(KEPT + 1)]
    with torch.no_grad():
        for x in tensors:
            double(x, 2)
        double(tensors[-1], 2)
        assert len(calls) == KEPT + 1
        double(tensors[0], 2)
    assert len(calls) == KEPT + 2


def test_inference_tensors_stay_in_inference_mode():
    double, calls = counted()
    x = torch.ones(2)
    with torch.inference_mode():
        assert double(x, 2).is_inference()
    with torch.no_grad():
        assert not double(x, 2).is_inference()
    assert len(calls) == 2


def test_nothing_is_kept_while_gradients_are_on():
    double, calls = counted()
    x = torch.ones(2, requires_grad=True)
    double(x, 2).sum().backward()
    double(x, 2).sum().backward()
    assert calls == [2, 2]
    assert x.grad.tolist() == [4.0, 4.0]
