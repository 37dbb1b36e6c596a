"""How a plain module's forward is tried: what sees the future, mixes sequences or cannot be continued is refused."""

import functools
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from attnzoo.attention import attention
from attnzoo.models import DecoderConfig, DecoderLM, build_shapes
from attnzoo.models.shapes import materialise
from tests.contract.cases import build_case
from tests.contract.contract import verify_contract
from tests.helpers.plain_modules import Future, Mine, registered, variant_of


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    with registered():
        yield


def test_a_forward_that_sees_the_future_is_refused_once_it_has_weights():
    kind = variant_of(Future)
    with pytest.raises(ValueError, match=r"Future\.forward sees the future: with \d+ tokens more.*`causal = False`"):
        attention(kind, model_dim=6)
    config = DecoderConfig(vocab_size=9, model_dim=6, num_layers=1, attention=kind, tie_embeddings=False)
    shapes = build_shapes(config)  # without weights nothing can be told
    weights = {name: torch.randn(x.shape) for name, x in shapes.state_dict().items()}
    model = materialise(shapes, weights, "cpu")
    with pytest.raises(ValueError, match=r"Future\.forward sees the future"):
        model.init_state(1, 4)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda self, x: x + torch.randn_like(x), "forward is random in evaluation mode"),
        (lambda self, x: x.add_(1.0), "forward writes to its input; work on a copy of it"),
        (lambda self, x: x + x.cumsum(0), "forward mixes sequences: .* is batch_first=True missing"),
        (lambda self, x: x + self.gate * x.mean(1, keepdim=True), "forward sees the future"),
        (lambda self, x: x + self.small * x.mean(1, keepdim=True), "forward sees the future"),
        (lambda self, x: x + self.scale * x.mean(1, keepdim=True), "forward sees the future"),
        (lambda self, x: x + torch.cat([x[:, 10:], torch.zeros_like(x[:, :10])], 1)[:, : x.shape[1]], "forward sees"),
        (lambda self, x: x.log(), "forward returns numbers that are not finite"),
        (lambda self, x: x + 1e-4 * x.mean(0), "forward mixes sequences"),
        (lambda self, x: 9 * x + 1e-3 * x.mean(1, keepdim=True), "forward sees the future: .* change by 0.00"),
        (lambda self, x: x * (1 // (x.shape[1] > 3)), "forward fails on x of .2, 1, 6.: ZeroDivisionError"),
    ],
    ids=[
        "random",
        "input written",
        "rows mixed",
        "a gate that begins closed",
        "nearly closed",
        "LayerScale",
        "ten ahead",
        "NaN",
        "rows mixed a little",
        "a small leak without a gate",
        "too short",
    ],
)
def test_a_forward_that_cannot_be_continued_is_refused(forward, message):
    class Odd(Mine):
        def __init__(self, model_dim: int) -> None:
            super().__init__(model_dim)
            self.gate = torch.nn.Parameter(torch.zeros(1))
            self.small = torch.nn.Parameter(torch.full((1,), 1e-12))
            self.scale = torch.nn.Parameter(torch.full((model_dim,), 1e-3))

    Odd.forward = forward
    with pytest.raises(ValueError, match=rf"Odd\.{message}"):
        attention(variant_of(Odd), model_dim=6)


def test_a_forward_that_means_to_read_later_tokens_keeps_the_rest_of_the_contract():
    class Meant(Future):
        causal = False

    build = functools.partial(build_case, variant_of(Meant), {})
    verify_contract(build)
    assert not hasattr(build(), "extend")
    assert build().cost(1, 5, 5).state_bytes == 0
    with pytest.raises(ValueError, match="'mine_plain' is not causal, and a decoder language model needs"):
        DecoderLM(DecoderConfig(vocab_size=9, model_dim=6, num_layers=1, attention="mine_plain"))


def test_a_context_that_leads_to_the_future_is_found():
    class Peeks(Mine):
        def forward(self, x, context=None, mask=None):
            return super().forward(x) if context is None else x + x.mean(1, keepdim=True)

    with pytest.raises(ValueError, match=r"Peeks\.forward sees the future"):
        attention(variant_of(Peeks), model_dim=6)


def test_a_small_leak_is_found_and_rounding_is_none():
    class Leaks(Mine):
        def forward(self, x):
            return super().forward(x) + 0.01 * x.mean(1, keepdim=True)

    with pytest.raises(ValueError, match="sees the future"):
        attention(variant_of(Leaks), model_dim=64)

    class Rounds(Mine):
        def forward(self, x):
            return torch.nn.functional.linear(super().forward(x).float(), torch.eye(64)).to(x.dtype)

    attention(variant_of(Rounds, "rounds"), model_dim=64)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        layer = attention(variant_of(Mine, f"mine_{dtype}"), model_dim=64).to(dtype)
        layer._tried = False
        layer.init_state(1, 3)
        assert layer._tried


def test_the_look_at_a_forward_leaves_no_trace():
    class Counts(Mine):
        def __init__(self, model_dim: int):
            super().__init__(model_dim)
            self.register_buffer("calls", torch.tensor(0))
            self.dropout = nn.Dropout(0.5).eval()

        def forward(self, x):
            self.calls += 1
            torch.rand(3)
            return self.dropout(super().forward(x))

    kind = variant_of(Counts)
    torch.manual_seed(3)
    Counts(6)
    expected = torch.rand(2)
    torch.manual_seed(3)
    layer = attention(kind, model_dim=6)
    assert torch.equal(torch.rand(2), expected)
    assert layer.module.calls == 0
    assert layer.training
    assert layer.module.training
    assert not layer.module.dropout.training
