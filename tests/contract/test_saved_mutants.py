"""Loading that loses something must not pass: each mutant is one plausible mistake in how a model gets its tensors."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attnzoo.checkpoint import load
from attnzoo.hf import AttnzooForCausalLM, modeling
from attnzoo.models import DecoderLM, shapes
from tests.contract.cases import build_case
from tests.contract.saved import check_saved
from tests.helpers.newcomers import newcomer

Patch = pytest.MonkeyPatch


def change_loaded(patch: Patch, change: Callable[[nn.Module, str, Tensor], Tensor]) -> None:
    """Loading goes on as ever, and then puts `change(owner, name, tensor)` in the place of every tensor."""
    right = load.materialise

    def wrong(model: DecoderLM, *rest: object) -> DecoderLM:
        right(model, *rest)  # type: ignore[arg-type]
        for owner in model.modules():
            for name, buffer in owner.named_buffers(recurse=False):
                owner._buffers[name] = change(owner, name, buffer)
            for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
                changed = change(owner, name, parameter)
                owner._parameters[name] = parameter if changed is parameter else nn.Parameter(changed)
        return model

    patch.setattr(load, "materialise", wrong)


def unsaved_buffers_keep_any_content(patch: Patch) -> None:
    """Buffers that no checkpoint holds get storage and no values."""

    def wrong(owner: nn.Module, name: str, tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor) if name in owner._non_persistent_buffers_set else tensor

    change_loaded(patch, wrong)


def unsaved_buffers_stay_on_meta(patch: Patch) -> None:
    """Buffers that no checkpoint holds are forgotten."""
    patch.setattr(shapes, "fill_buffers", lambda *arguments: None)


def integers_become_weights(patch: Patch) -> None:
    """Saved integers get the dtype of the weights, as if all tensors were numbers to compute with."""

    def wrong(owner: nn.Module, name: str, tensor: Tensor) -> Tensor:
        counts = name in owner._buffers and not tensor.is_complex() and not tensor.is_floating_point()
        return tensor.float() if counts else tensor

    change_loaded(patch, wrong)


def numbers_get_an_axis(patch: Patch) -> None:
    """Parameters without axes come back as vectors of one, which computes the same."""
    change_loaded(patch, lambda owner, name, tensor: tensor.detach()[None] if name == "gain" else tensor)


def names_part(patch: Patch) -> None:
    """Every name of a parameter gets a parameter of its own: equal now, and different after a step."""
    patch.setattr(shapes, "tie_parameters", lambda *arguments: None)


def transformers_leaves_any_content(patch: Patch) -> None:
    """from_pretrained makes storage for buffers that no checkpoint holds, and nothing fills it."""
    patch.setattr(modeling, "_lost", lambda tensor: False)


def transformers_trains_everything(patch: Patch) -> None:
    """from_pretrained makes new parameters, of which none is frozen."""
    patch.setattr(AttnzooForCausalLM, "tie_weights", modeling.PreTrainedModel.tie_weights)


MUTANTS: list[tuple[Callable[[Patch], None], str]] = [
    (unsaved_buffers_keep_any_content, "slopes has other values once the model is loaded"),
    (unsaved_buffers_stay_on_meta, "has no values once the model is loaded"),
    (integers_become_weights, "is torch.float32 once loaded, not torch.int64"),
    (numbers_get_an_axis, r"gain is \[1\] once loaded, not \[\]"),
    (names_part, "other parameters have two names once loaded"),
    (transformers_leaves_any_content, "has other values once the model is loaded by transformers"),
    (transformers_trains_everything, "on one side only once loaded by transformers"),
]


@pytest.mark.parametrize(("mutate", "problem"), MUTANTS, ids=[mutate.__name__ for mutate, _ in MUTANTS])
def test_loading_that_loses_something_is_noticed(mutate, problem, monkeypatch):
    with newcomer("buffered"):
        mutate(monkeypatch)
        with pytest.raises(AssertionError, match=problem):
            check_saved(functools.partial(build_case, "buffered", {}))
