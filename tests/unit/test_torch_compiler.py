"""What is used of torch's compiler beside its public interface is where it was. A release of torch that moves it fails
here first: what has moved is then to be found in the compiler's configuration, or in torch._dynamo."""

import inspect

import pytest
import torch
from torch._inductor import config

from attnzoo.models.torch_compiler import has_compiler, vary, without_guards


def test_guards_can_be_left_out():
    """The filter is asked about every guard, and keeps none; the options are those that the compiler knows."""
    kept = torch.compiler.skip_all_guards_unsafe(["one guard", "another"])
    assert list(kept) == [False, False]
    assert config.reorder_for_locality is True
    assert callable(without_guards(lambda x: x + 1))  # an unknown option raises here, before anything is compiled


def test_sizes_can_be_said_to_vary():
    assert "hint_override" in inspect.signature(torch._dynamo.mark_dynamic).parameters
    x = torch.zeros(5, 7)
    vary(x, 1, 16)
    assert x._dynamo_dynamic_indices == {1}
    assert x._dynamo_hint_overrides == {1: 16}


def test_a_missing_compiler_is_noticed():
    assert has_compiler()
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert not has_compiler()


@pytest.mark.heavy
def test_code_without_guards_takes_other_sizes():
    """One compilation for all sizes that vary."""
    counted = []

    def double(x):
        counted.append(1)
        return 2 * x + x.shape[0]

    compiled, x = without_guards(double), torch.ones(5, 7)
    vary(x, 0, 16)
    for rows in (5, 9, 16, 33):
        given = x if rows == 5 else torch.ones(rows, 7)
        assert torch.equal(compiled(given), torch.full((rows, 7), 2.0 + rows))
