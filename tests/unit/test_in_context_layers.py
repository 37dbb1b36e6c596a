"""What the in-context layers are built for: written weights are steps of known algorithms."""

import pytest
import torch

from attnzoo.attention import build_attention
from attnzoo.incontext import LinearFamily, descend, linear_tasks, seeded
from attnzoo.incontext.descent import predict
from attnzoo.incontext.softmax import softmax_head, softmax_tasks
from train.experiments.gram import GramAttention

DIM = 5
TASKS = linear_tasks(30, LinearFamily(dim=DIM, examples=7), seeded(20)).double()


def linear_layer(**options):
    return build_attention("in_context_linear", {"model_dim": DIM + 1, **options}).double()


def answer(e_BTE: torch.Tensor) -> torch.Tensor:
    return -e_BTE[:, -1, -1]


def test_a_constructed_layer_is_a_step_of_gradient_descent():
    layer, e = linear_layer(), TASKS.tokens()
    layer.set_gradient_step(0.2)
    once = e + layer(e)
    torch.testing.assert_close(
        answer(once), predict(TASKS, descend(torch.tensor([0.2], dtype=torch.float64))), rtol=0, atol=1e-12
    )
    thrice = once
    for _ in range(2):
        thrice = thrice + layer(thrice)
    torch.testing.assert_close(
        answer(thrice), predict(TASKS, descend(torch.full((3,), 0.2, dtype=torch.float64))), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(once[:, :, :-1], e[:, :, :-1], rtol=0, atol=0)


def test_a_constructed_layer_starts_where_it_is_told():
    """From W0 the update is -rate sum (W0 . x_j - y_j) x_j, read at the query."""
    layer, e = linear_layer(), TASKS.tokens()
    start = torch.linspace(-1, 1, DIM, dtype=torch.float64)
    layer.set_gradient_step(0.2, start)
    residual = TASKS.x_BTD @ start - TASKS.y_BT
    moved = -0.2 * (residual[:, None] @ TASKS.x_BTD)[:, 0]
    torch.testing.assert_close(answer(e + layer(e)), (moved * TASKS.query_BD).sum(-1), rtol=0, atol=1e-12)


def test_a_constructed_layer_is_a_step_of_gd_plus_plus():
    layer, e = linear_layer(), TASKS.tokens()
    rates, shrinks = (torch.tensor(v, dtype=torch.float64) for v in ([0.3, 0.4], [0.05, 0.02]))
    for rate, shrink in zip(rates.tolist(), shrinks.tolist(), strict=True):
        layer.set_gradient_step(rate, shrink=shrink)
        e = e + layer(e)
    torch.testing.assert_close(answer(e), predict(TASKS, descend(rates, shrinks)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("damping", [1.0, 0.75])
def test_the_gram_form_is_the_layer(damping):
    model = GramAttention(DIM + 1, 3, looped=False, std=0.1, generator=seeded(21)).double()
    e = TASKS.tokens()
    for index in range(3):
        layer = linear_layer()
        layer.set_products(*(weight[None].detach() for weight in model.layer(index)))
        e = e + damping * layer(e)
    torch.testing.assert_close(model(TASKS, damping=damping), answer(e), rtol=1e-12, atol=1e-12)


def test_products_are_what_the_layer_computes():
    layer = linear_layer(num_heads=2)
    qk, vp = (torch.randn(2, DIM + 1, DIM + 1, generator=seeded(22, k)).double() for k in range(2))
    layer.set_products(qk, vp)
    torch.testing.assert_close(layer.query_key(), qk)
    torch.testing.assert_close(layer.value_output(), vp)
    e = TASKS.tokens()
    read = e[:, :-1]
    by_hand = sum(e @ qk[n] @ read.mT @ read @ vp[n] for n in range(2))
    torch.testing.assert_close(layer(e), by_hand, rtol=0, atol=1e-10)


def test_a_constructed_softmax_head():
    """The layer's weights are the closed form's, and for small sharpness a step of gradient descent on the linearised
    loss."""
    tasks = softmax_tasks(40, 9, 3, 0.3, seeded(23))
    layer = build_attention("softmax_regression", {"model_dim": 4}).double()
    e = tasks.tokens().double()
    # In float32 the targets' mean is 1 up to 1e-7, which a small sharpness blows up.
    limit = 1 + 0.5 / 9 * ((tasks.y_BT - 1)[:, None] @ tasks.a_BTD @ tasks.query_BD[..., None])[:, 0, 0].double()
    errors = []
    for sharpness in (0.1, 0.01):
        layer.set_linearised_step(0.5, sharpness)
        got = 1 + (e + layer(e))[:, -1, -1]
        torch.testing.assert_close(got, softmax_head(tasks, 0.5, sharpness).double(), rtol=0, atol=1e-4)
        errors.append((got - limit).abs().max().item())
    assert errors[1] < 0.15 * errors[0]
    assert errors[1] < 1e-3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_layer(num_heads=2).set_gradient_step(0.1), "the construction has one head"),
        (lambda: linear_layer(head_dim=3).set_gradient_step(0.1), "with head_dim=None"),
        (lambda: build_attention("softmax_regression", {"model_dim": 4}).set_linearised_step(0.1, 0.0), "sharpness=0"),
        (lambda: linear_layer(num_queries=-1), "num_queries=-1 must be at least 0"),
        (lambda: linear_layer(num_queries=8)(TASKS.tokens()), "leave nothing to read"),
        (lambda: build_attention("mesa", {"model_dim": 8, "ridge": 0.0}), "ridge=0.0 must be positive"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
