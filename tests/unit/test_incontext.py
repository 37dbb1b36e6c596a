"""Closed forms of in-context regression, by Monte Carlo in float64 and by finite differences."""

import itertools
import math

import pytest
import torch

from attnzoo.incontext import (
    LinearFamily,
    Spectrum,
    Tasks,
    best_descents,
    chebyshev_rates,
    descend,
    even_moments,
    gaussian_step,
    least_squares_step,
    linear_tasks,
    mixed_preconditioner,
    newton,
    odd_function_step,
    ridge,
    seeded,
    sine_tasks,
)
from attnzoo.incontext.descent import predict, ridge_residual, solved_weights
from attnzoo.incontext.softmax import (
    linearised_step,
    shift_bounds,
    shifted_target,
    softmax_gradient,
    softmax_hessian,
    softmax_loss,
    softmax_model,
    softmax_step,
    softmax_tasks,
)

DRAWS = 200_000
SPREAD = (4.0, 2.0, 1.0, 0.25)


def within(values: torch.Tensor, expected: float, what: str, deviations: float = 4.5) -> None:
    """A mean over independent draws lies within 4.5 of its own standard errors: once in 150,000 tests by chance."""
    error = values.std() / math.sqrt(len(values))
    rounding = 1e-6 * max(1.0, abs(expected))  # entries that are all alike, drawn in float32
    assert abs(values.mean() - expected) < deviations * error + rounding, (
        f"{what}: {values.mean()} +- {error}, not {expected}"
    )


def exact(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def best_rate(moment_BD: torch.Tensor, tasks: Tasks) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the least-squares rate eta = E y z / E z^2 of predictions eta z: numerator and denominator draws."""
    z_B = (moment_BD * tasks.query_BD).sum(-1)
    return z_B * tasks.target_B, z_B * z_B


def moments(tasks: Tasks) -> torch.Tensor:
    return (tasks.x_BTD.mT @ tasks.y_BT[..., None])[..., 0]


@pytest.mark.parametrize(("inputs", "radius"), [("uniform", 1.0), ("uniform", 0.5), ("normal", 1.0)])
def test_best_rate_and_least_loss_of_a_step(inputs, radius):
    family = LinearFamily(dim=5, examples=7, inputs=inputs, radius=radius * (math.sqrt(3) if inputs == "normal" else 1))
    tasks = linear_tasks(DRAWS, family, seeded(1, inputs, radius)).double()
    step = least_squares_step(5, 7, *even_moments(inputs, radius))
    top, bottom = best_rate(moments(tasks), tasks)
    within(top - step.rate * bottom, 0.0, "slope of the loss at the best rate")
    errors = tasks.target_B - step.rate * (moments(tasks) * tasks.query_BD).sum(-1)
    within(0.5 * errors.square(), step.loss, "loss")


def test_numbers_of_the_papers():
    """Known values at N = d = 10."""
    step = least_squares_step(10, 10, *even_moments("uniform", 1.0))
    assert step.rate == pytest.approx(0.151515, abs=1e-6)
    assert step.loss == pytest.approx(0.824916, abs=1e-6)
    half = least_squares_step(10, 10, *even_moments("uniform", 0.5))
    assert (half.rate, half.loss) == (pytest.approx(4 * step.rate), pytest.approx(step.loss / 4))
    normal = least_squares_step(10, 10, *even_moments("normal"))
    assert (normal.rate, normal.loss) == (pytest.approx(1 / 21), pytest.approx(2.619048, abs=1e-6))
    with pytest.raises(ValueError, match="inputs='cauchy'"):
        even_moments("cauchy")


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("weights", ["inverse", 1.0])
def test_preconditioned_step(weights, noise):
    family = LinearFamily(dim=4, examples=8, inputs="normal", covariance=SPREAD, weights=weights, noise=noise)
    tasks = linear_tasks(DRAWS, family, seeded(2, weights, noise)).double()
    if weights == "inverse":
        step = gaussian_step(4, 8, noise)
        gamma, loss = step.rate * torch.diag(1 / torch.tensor(SPREAD, dtype=torch.float64)), step.loss
    else:
        gamma, loss = mixed_preconditioner(torch.tensor(SPREAD), 8, noise)
    errors = tasks.target_B - (moments(tasks) @ gamma * tasks.query_BD).sum(-1)
    within(errors.square(), loss, "loss")
    # The loss is quadratic in the preconditioner: at its minimum every entry's slope is zero.
    for row, column in itertools.product(range(4), repeat=2):
        slope = errors * moments(tasks)[:, row] * tasks.query_BD[:, column]
        within(slope, 0.0, f"slope of entry {row}, {column}")


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_step_for_a_signed_relu(noise):
    generator = seeded(3, noise)
    tasks = linear_tasks(
        DRAWS, LinearFamily(dim=4, examples=8, inputs="normal", covariance=(1.0,) * 4), generator
    ).double()
    sign = torch.randint(0, 2, (DRAWS, 1), generator=generator) * 2.0 - 1
    bent = [sign * y.relu() + noise**0.5 * torch.randn(y.shape, generator=generator).double()
            for y in (tasks.y_BT, tasks.target_B[:, None])]  # fmt: skip
    tasks = Tasks(tasks.x_BTD, bent[0], tasks.query_BD, bent[1][:, 0])
    step = odd_function_step(4, 8, noise)
    top, bottom = best_rate(moments(tasks), tasks)
    within(top - step.rate * bottom, 0.0, "slope of the loss at the best rate")
    within((tasks.target_B - step.rate * (moments(tasks) * tasks.query_BD).sum(-1)).square(), step.loss, "loss")


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_loss_of_a_solver_from_the_spectrum(noise):
    """Half the squared error on the noiseless target, for GD++ and for ridge."""
    family = LinearFamily(dim=4, examples=6, inputs="normal", covariance=SPREAD, noise=noise)
    spectrum = Spectrum.of(100_000, family, seeded(4, "spectrum"))
    tasks = linear_tasks(100_000, family, seeded(4, "tasks"))
    for residual in (descend(exact(0.02, 0.03), exact(0.01, 0.02)), ridge_residual(0.7)):
        error = predict(tasks, residual) - tasks.target_B.double()
        expected = spectrum.loss(residual).item() + noise / 2
        within(0.5 * error.square(), expected, "loss", deviations=6)  # the spectrum is a sample too


def test_gd_plus_plus_by_its_layers():
    """The residual polynomial against the layers' own updates of x, y and query."""
    tasks = linear_tasks(50, LinearFamily(dim=4, examples=6), seeded(5)).double()
    rates, shrinks = (0.3, 0.2, 0.5), (0.05, 0.1, 0.02)
    x, y, query, answer = tasks.x_BTD, tasks.y_BT[..., None], tasks.query_BD[:, None], torch.zeros(50, 1, 1).double()
    for rate, shrink in zip(rates, shrinks, strict=True):
        s = x.mT @ x
        answer = answer - rate * query @ (x.mT @ y)
        y = y - rate * x @ (x.mT @ y)
        x, query = x - shrink * x @ s, query - shrink * query @ s
    solved = predict(tasks, descend(exact(*rates), exact(*shrinks)))
    torch.testing.assert_close(-answer[:, 0, 0], solved, rtol=0, atol=1e-10)


def test_gradient_descent_and_newton_by_iteration():
    tasks = linear_tasks(50, LinearFamily(dim=4, examples=6), seeded(6)).double()
    s, moment = tasks.x_BTD.mT @ tasks.x_BTD, tasks.x_BTD.mT @ tasks.y_BT[..., None]
    w = torch.zeros_like(moment)
    for rate in (0.1, 0.3, 0.2):
        w = w - rate * (s @ w - moment)
    residual = descend(exact(0.1, 0.3, 0.2))
    torch.testing.assert_close(w[..., 0], solved_weights(tasks, residual), rtol=0, atol=1e-10)
    inverse = 0.1 * torch.eye(4, dtype=torch.float64).expand_as(s)
    for _ in range(3):
        inverse = 2 * inverse - inverse @ s @ inverse
    torch.testing.assert_close((inverse @ moment)[..., 0], solved_weights(tasks, newton(3, 0.1)), rtol=0, atol=1e-10)


def test_chebyshev_is_the_least_in_maximum():
    low, high = 0.5, 4.0
    points = torch.linspace(low, high, 2001, dtype=torch.float64)
    for steps in (1, 2, 5):
        largest = descend(chebyshev_rates(steps, low, high))(points).abs().max().item()
        # 1 / T_K at where 0 lies relative to the interval.
        assert largest == pytest.approx(1 / math.cosh(steps * math.acosh((high + low) / (high - low))), rel=1e-6)


@pytest.mark.heavy
def test_fitted_solvers():
    """Known optima at r = .5 in units of the text (20,000 tasks there), and that more freedom is never worse."""
    spectrum = Spectrum.of(6000, LinearFamily(dim=10, examples=10, radius=0.5), seeded(7))
    found = {name: best_descents(name, 3, spectrum) for name in ("gd", "gd per step", "gd++", "chebyshev", "newton")}
    expected = {
        "gd": (0.20622, 0.15657, 0.13264),
        "gd per step": (0.20622, 0.14119, 0.10985),
        "gd++": (0.20622, 0.11039, 0.0776),
    }
    for name, losses in expected.items():
        assert [s.loss for s in found[name]] == [pytest.approx(loss, rel=0.02) for loss in losses], name
    assert found["gd++"][1].parameters["rates"][0] == pytest.approx(1.35, rel=0.02)
    assert found["gd++"][1].parameters["shrinks"][0] == pytest.approx(0.176, rel=0.02)
    for k in range(3):
        assert found["gd per step"][k].loss <= found["gd"][k].loss + 1e-9
        assert (
            found["gd per step"][k].loss <= found["chebyshev"][k].loss + 1e-9
        )  # a Chebyshev polynomial is one of them
    free, shared = (best_descents(name, 5, spectrum) for name in ("gd++ per step", "gd++"))
    losses = [solver.loss for solver in free]
    assert losses == sorted(losses, reverse=True)
    assert all(a.loss <= b.loss + 1e-9 for a, b in zip(free, shared, strict=True))
    with pytest.raises(ValueError, match="know gd, gd per step"):
        best_descents("adam", 1, spectrum)


def test_ridge_is_the_bayes_predictor():
    """Its error is below that of other penalties on noisy tasks, and 0 penalty interpolates."""
    family = LinearFamily(dim=4, examples=8, inputs="normal", covariance=(1.0,) * 4, noise=0.5)
    tasks = linear_tasks(50_000, family, seeded(8)).double()
    best = (ridge(tasks, 0.5) - tasks.target_B).square()
    for penalty in (0.05, 0.25, 1.0, 2.0):
        difference = (ridge(tasks, penalty) - tasks.target_B).square() - best
        assert difference.mean() > 3 * difference.std() / math.sqrt(len(difference))
    clean = linear_tasks(100, LinearFamily(dim=4, examples=8), seeded(9)).double()
    torch.testing.assert_close(ridge(clean, 0.0), clean.target_B, rtol=0, atol=1e-5)  # y is a float32 product


def test_tasks_are_what_they_say():
    tasks = linear_tasks(20_000, LinearFamily(dim=3, examples=5, inputs="sparse", weights=2.0), seeded(10))
    for inputs in ("uniform", "normal", "laplace", "exponential", "binary", "sparse"):
        x = linear_tasks(40_000, LinearFamily(dim=3, examples=5, inputs=inputs, radius=1.5), seeded(10, inputs)).x_BTD
        within(x.flatten().double().square(), 1.5**2 / 3, f"variance of {inputs}", 6)
        within(x.flatten().double(), 0.0, f"mean of {inputs}", 6)
    assert torch.equal(
        tasks.x_BTD,
        linear_tasks(20_000, LinearFamily(dim=3, examples=5, inputs="sparse", weights=2.0), seeded(10)).x_BTD,
    )
    tokens = tasks.tokens()
    assert tokens.shape == (20_000, 6, 4)
    assert torch.equal(tokens[:, -1, -1], torch.zeros(20_000))
    sine = sine_tasks(1000, 5, seeded(11))
    assert sine.y_BT.abs().max() <= 0.5
    with pytest.raises(ValueError, match="3 variances for dim=4"):
        LinearFamily(dim=4, covariance=(1.0, 2.0, 3.0), inputs="normal")
    with pytest.raises(ValueError, match="noise=-1"):
        LinearFamily(noise=-1)


def random_instance(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = seeded(12, seed)
    a = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    b = torch.rand(7, generator=generator, dtype=torch.float64)
    return a, torch.randn(4, generator=generator, dtype=torch.float64), b / b.sum()


@pytest.mark.parametrize("seed", range(4))
def test_gradient_and_hessian_of_softmax_regression(seed):
    a, x, b = random_instance(seed)
    step, eye = 1e-5, torch.eye(4, dtype=torch.float64)
    slopes = torch.stack(
        [(softmax_loss(a, x + step * e, b) - softmax_loss(a, x - step * e, b)) / (2 * step) for e in eye]
    )
    torch.testing.assert_close(softmax_gradient(a, x, b), slopes, rtol=0, atol=1e-9)
    bends = torch.stack(
        [(softmax_gradient(a, x + step * e, b) - softmax_gradient(a, x - step * e, b)) / (2 * step) for e in eye]
    )
    torch.testing.assert_close(softmax_hessian(a, x, b), bends, rtol=0, atol=1e-9)
    exact = torch.autograd.functional.hessian(lambda z: softmax_loss(a, z, b), x)
    torch.testing.assert_close(softmax_hessian(a, x, b), exact, rtol=0, atol=1e-12)


def test_shifted_target_and_its_bounds():
    a, x, b = random_instance(5)
    before, after = softmax_model(a, x), softmax_model(a, x + 0.1)
    target = shifted_target(b, before, after)
    assert (before - target).norm() == pytest.approx((after - b).norm().item(), abs=1e-14)
    radius = max(torch.linalg.matrix_norm(a, 2).item(), (x + 0.1).norm().item())
    bounds = shift_bounds(7, radius)
    assert (target - b).norm() <= bounds.tight * 0.1 * 2.0  # |(.1, .1, .1, .1)| = .2
    assert bounds.paper > 1e10 * bounds.tight
    # |J| = 1/2 is reached: two equal outcomes.
    f = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert torch.linalg.matrix_norm(torch.diag(f) - torch.outer(f, f), 2) == pytest.approx(0.5)


def test_step_on_softmax_regression():
    """One step from x = 0 by autograd; small steps are their linearisation."""
    tasks = softmax_tasks(20, 9, 3, 0.5, seeded(13))
    assert torch.allclose(tasks.y_BT.mean(dim=1), torch.ones(20))
    expected = []
    for index in range(20):
        a, b = tasks.a_BTD[index].double(), tasks.y_BT[index].double() / 9
        x = -0.3 * 81 * softmax_gradient(a, torch.zeros(3, dtype=torch.float64), b)
        expected.append((tasks.query_BD[index].double() @ x).exp() / (a @ x).exp().mean())
    torch.testing.assert_close(softmax_step(tasks, 0.3).double(), torch.stack(expected), rtol=1e-4, atol=1e-4)
    small, line = softmax_step(tasks, 1e-3) - 1, linearised_step(tasks, 1e-3) - 1
    torch.testing.assert_close(small, line, rtol=0, atol=1e-5)
