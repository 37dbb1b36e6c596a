"""What a layer cannot take is refused by name, with a way out, before anything is computed."""

import re

import pytest
import torch

from attnzoo.attention import build_attention
from attnzoo.attention.forward_only import as_variant
from attnzoo.ops.common.masks import Mask, document_starts

KINDS = {name: build_attention(name, {"model_dim": 24}) for name in ("mha", "rmha", "mdha", "rcmha", "linear", "mesa")}
KINDS["window"] = build_attention("mha", {"model_dim": 24, "window": 4})


class Plain(torch.nn.Module):
    """The identity. Source: none."""

    def __init__(self, model_dim: int) -> None:
        super().__init__()

    def forward(self, x):
        return x


_PLAIN = as_variant(Plain)
KINDS["plain"] = _PLAIN(_PLAIN.Config(model_dim=24))


@torch.no_grad()
def test_rooms_that_are_none_are_refused_by_every_kind():
    """Kills: a capacity of -1, 1.5 or None that two variants take and others give to torch."""
    for kind, layer in KINDS.items():
        for field, values in (("batch", (-1, 1.5, None, True, "2")), ("capacity", (-1, 1.5, None, False, [3]))):
            for value in values:
                with pytest.raises(ValueError, match=rf"\.init_state got {field}=.* must be a number of"):
                    layer.init_state(**{"batch": 2, "capacity": 5, field: value})
        if kind not in ("linear", "mesa", "window"):
            with pytest.raises(ValueError, match="does not fit into memory; give init_state a smaller batch or capac"):
                layer.init_state(batch=2, capacity=10**15)


@torch.no_grad()
def test_states_of_other_layers_are_refused_by_every_kind():
    """Kills: a state of another variant or size that broadcasts, or fails deep inside."""
    x = torch.randn(2, 3, 24)
    for kind, layer in KINDS.items():
        others = {name: each.init_state(2, 9) for name, each in KINDS.items()}
        others["wide"] = build_attention("mha", {"model_dim": 24, "num_heads": 3, "head_dim": 4}).init_state(2, 9)
        others["conv"] = build_attention("mdha", {"model_dim": 24, "conv_width": 4}).init_state(2, 9)
        others["far"] = build_attention("mha", {"model_dim": 24, "window": 8}).init_state(2, 9)
        same = {kind, *({"mha", "rmha"} if kind in ("mha", "rmha") else {"mdha", "rcmha"} if "d" in kind else ())}
        same |= {"mdha", "rcmha"} if kind == "rcmha" else set()
        for name, state in {**others, "None": None, "text": "state", "tuple": (1, 2)}.items():
            if name not in same:
                with pytest.raises(ValueError, match=r"got (the state of another|no state|a \w+ where).*init_state"):
                    layer.extend(x, state)


@torch.no_grad()
def test_inputs_of_other_types_are_refused_by_every_kind():
    """Kills: an AttributeError, or the words of a matrix product."""
    x = torch.randn(2, 3, 24)
    for kind, layer in KINDS.items():
        state = layer.init_state(2, 5)
        for wrong in (None, [[1.0]], x.numpy()):
            for call in (
                layer,
                layer.reference,
                lambda given, layer=layer: layer.extend(given, layer.init_state(2, 5)),
            ):
                with pytest.raises(ValueError, match=r"got x, a \w+; give a tensor, \[batch, tokens, 24\]"):
                    call(wrong)
        for counts in ([2, 3], 2, "all", x.numpy()):
            with pytest.raises(ValueError, match=r"got counts_B, a \w+; give a tensor, torch.tensor\(\[\.\.\.\]\)"):
                layer.extend(x, state, counts)
        if kind == "plain":
            continue
        for dtype in (torch.int64, torch.float16, torch.float64):
            for call in (layer, lambda given, layer=layer: layer.extend(given, layer.init_state(2, 5))):
                with pytest.raises(ValueError, match=rf"got x in {dtype}.* weights.* torch.float32"):
                    call(x.to(dtype))
        with torch.autocast("cpu", torch.bfloat16):  # which converts
            assert layer(x.bfloat16()).shape == x.shape
        if layer.traits.context:
            for wrong in ([1], x.double()):
                with pytest.raises(ValueError, match="got context_BSD"):
                    layer(x, context_BSD=wrong)
            with pytest.raises(ValueError, match="got keys_BS, a list; give a tensor, bool"):
                layer.init_context(x, [True])


def test_masks_and_documents_that_count_no_tokens_are_refused():
    """Kills: a prefix of -1 tokens, or of more than there are."""
    layer, x = KINDS["mha"], torch.randn(2, 6, 24)
    for prefix in ([-1, 2], [99, 2], [0, 7]):
        with pytest.raises(ValueError, match=r"prefix_B=\[.*\] of MHA counts .* between 0 and 6"):
            layer(x, mask=Mask(prefix_B=torch.tensor(prefix)))
    layer.check_input(x, None, Mask(prefix_B=torch.tensor([0, 6])))
    for edges in ([0, 3, 12], torch.tensor([0.0, 3.0, 12.0]), None):
        with pytest.raises(ValueError, match=r"cu_seqlens has dtype .* it must be int64"):
            document_starts(edges, 2, 6)


@torch.no_grad()
def test_not_a_number_stays_in_its_sequence():
    """Kills: a factorisation that fails for the whole batch."""
    for layer in KINDS.values():
        x = torch.randn(3, 70, 24)
        right = layer(x)
        x[1, 40] = torch.nan
        for y in (layer(x), layer.extend(x, layer.init_state(3, 70))[0]):
            torch.testing.assert_close(y[::2], right[::2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["mha", "rmha", "mdha", "rcmha", "linear", "mesa"])
def test_a_second_derivative_is_right_or_an_error(kind):
    """Kills: torch's once_differentiable, with which `torch.autograd.grad` leaves an operation out of the sum."""
    layer = build_attention(kind, {"model_dim": 8, "num_heads": 2}).double()
    x = torch.randn(1, 6, 8, dtype=torch.float64, requires_grad=True)

    def twice(forward):
        (first,) = torch.autograd.grad(forward(x).pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), x)[0]

    refused = ""
    try:
        found = twice(layer)
    except RuntimeError as error:
        refused = str(error)
    if refused:
        assert re.search("derivative|no autograd formula", refused)
    else:
        torch.testing.assert_close(found, twice(layer.reference))


class Whole(Plain):
    """Whole numbers. Source: none."""

    def forward(self, x):
        return x.long()


def test_a_forward_that_gives_whole_numbers_is_told_so():
    cls = as_variant(Whole)
    with pytest.raises(
        ValueError, match=r"Whole.forward returned torch.int64 for x of .*; .* of floating-point numbers"
    ):
        cls(cls.Config(model_dim=24))
