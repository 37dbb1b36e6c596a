"""Iterative solvers of least squares as polynomials of S = X^T X, and their best parameters for a family of tasks.

After K steps a solver that starts at w = 0 leaves the residual p(S) w of the true weights w, with p(0) = 1:

    gradient descent                    p(s) = prod_k (1 - a_k s)
    GD++ (arXiv 2212.07677, app. A.10)  p(s) = prod_k (1 - a_k s_k),  s_{k+1} = s_k (1 - g_k s_k)^2
    Newton for S^-1 from M = a I        p(s) = (1 - a s)^(2^K)        (Newton-Schulz, as in arXiv 2310.17086)
    ridge                               p(s) = c / (s + c)

and its weights are q(S) X^T y with q(s) = (1 - p(s)) / s. GD++: each layer does y <- y - a X X^T y, X <- X - g X S and
x_q <- (I - g S) x_q. If y = X r with r = w at first, then r becomes (I - g S)^-1 (I - a S) r, so that the query's
residual x_q . r becomes x_q . (I - a S) r: the factors (I - g S) cancel, and the next step's S is S (I - g S)^2.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.incontext.tasks import LinearFamily, Tasks, linear_tasks

Residual = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues s_i of S of many contexts, c_i = v_i . Sigma v_i for their eigenvectors v_i, and the noise's
    variance.

    The loss of a solver follows without drawing w, query or noise:
    .5 E |x_q . p(S) w - x_q . q(S) X^T eps|^2 = .5 sum_i c_i (p(s_i)^2 + noise s_i q(s_i)^2), for w ~ N(0, I).
    """

    eigenvalues_BD: Tensor
    weights_BD: Tensor
    noise: float = 0.0

    @classmethod
    def of(cls, batch: int, family: LinearFamily, generator: torch.Generator) -> "Spectrum":
        """The spectrum of `batch` contexts drawn from a family, in float64."""
        x_BTD = linear_tasks(batch, family, generator).x_BTD.double()
        eigenvalues_BD, vectors_BDD = torch.linalg.eigh(x_BTD.mT @ x_BTD)
        weights_BD = (vectors_BDD.square() * family.variances()[:, None]).sum(dim=1)
        return cls(eigenvalues_BD.clamp(min=0), weights_BD, family.noise)

    def loss(self, residual: Residual) -> Tensor:
        """Half the mean squared error on the noiseless target."""
        s_BD = self.eigenvalues_BD
        p_BD = residual(s_BD)
        errors_BD = p_BD.square()
        if self.noise:
            errors_BD = errors_BD + self.noise * (1 - p_BD).square() / s_BD.clamp(min=1e-12)
        return 0.5 * (self.weights_BD * errors_BD).sum(dim=1).mean()


def descend(rates: Tensor, shrinks: Tensor | None = None) -> Residual:
    """Residual polynomial of gradient descent with one rate a_k per step; with `shrinks` (the g_k), of GD++."""

    def residual(s: Tensor) -> Tensor:
        p = torch.ones_like(s)
        for step, rate in enumerate(rates):
            p = p * (1 - rate * s)
            if shrinks is not None:
                s = s * (1 - shrinks[step] * s).square()
        return p

    return residual


def newton(steps: int, scale: float | Tensor) -> Residual:
    """Newton-Schulz for S^-1 from M_0 = scale I: I - M_{k+1} S = (I - M_k S)^2, as M_{k+1} = 2 M_k - M_k S M_k."""
    return lambda s: (1 - scale * s) ** (2**steps)


def chebyshev_rates(steps: int, low: float | Tensor, high: float | Tensor) -> Tensor:
    """Rates whose p is the Chebyshev polynomial of [low, high] scaled to p(0) = 1, which has the least maximum there.

    Its zeros are the K points (high+low)/2 + (high-low)/2 cos((2k-1) pi / 2K), and the zeros of prod (1 - a_k s) are
    1/a_k.
    """
    odd_K = 2 * torch.arange(1, steps + 1, dtype=torch.float64) - 1
    return 1 / ((high + low) / 2 + (high - low) / 2 * torch.cos(odd_K * torch.pi / (2 * steps)))


def ridge_residual(penalty: float) -> Residual:
    """Residual of ridge regression; least squares at 0."""
    return lambda s: penalty / (s + penalty) if penalty else (s <= 0).to(s.dtype)


@dataclass(frozen=True)
class Solver:
    """A solver with its best parameters: name, residual, loss on the spectrum they were fitted on, the parameters."""

    name: str
    residual: Residual
    loss: float
    parameters: dict[str, list[float]]


SOLVERS = ("gd", "gd per step", "gd++", "gd++ per step", "chebyshev", "newton")


def best_descents(name: str, most: int, spectrum: Spectrum, iterations: int = 60) -> list[Solver]:
    """The solver `name` of `SOLVERS` with 1 to `most` steps, its parameters fitted to the spectrum by L-BFGS in
    float64.

    "gd", "gd++": one rate (and shrink) for all steps; "per step": one each; "chebyshev": the interval; "newton": the
    first scale. Losses are not convex in the rates of many steps: a shared solution starts from that with one step
    fewer. One with a rate per step starts from the shared one, spread a little because equal rates are a saddle, and
    from its own with one step fewer and a small step added, so that more steps are never worse. Raises ValueError for
    an unknown name or most < 1.
    """
    if name not in SOLVERS or most < 1:
        raise ValueError(f"solver {name!r} with {most} steps: know {', '.join(SOLVERS)}, with at least 1 step")
    shared = None
    if name.endswith(" per step"):
        shared = best_descents(name.removesuffix(" per step"), most, spectrum, iterations)
    found: list[Solver] = []
    for steps in range(1, most + 1):
        if shared is not None:
            starts = [_spread(shared[steps - 1].parameters, steps)]
            starts += [_one_more(found[-1].parameters)] if found else []
        else:
            starts = [_values(name, found[-1].parameters) if found else _first(name, spectrum)]
        fits = [_fit(name, steps, start, spectrum, iterations) for start in starts]
        found.append(min(fits, key=lambda solver: solver.loss))
    return found


def _fit(name: str, steps: int, start: Tensor, spectrum: Spectrum, iterations: int) -> Solver:
    """The best point that the search visited; its last one may be where rare contexts overflow."""
    # Logarithms keep everything positive and of order 1.
    free = start.log().clone().requires_grad_()
    least, best = math.inf, free.detach().clone()
    optimiser = torch.optim.LBFGS([free], max_iter=iterations, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure() -> float:
        nonlocal least, best
        optimiser.zero_grad()
        loss = spectrum.loss(_residual(name, steps, free.exp()))
        loss.backward()
        if loss.item() < least:
            least, best = loss.item(), free.detach().clone()
        return loss.item()

    optimiser.step(closure)
    found = best.exp()
    return Solver(name, _residual(name, steps, found), least, _named(name, steps, found))


def _first(name: str, spectrum: Spectrum) -> Tensor:
    """Start of the fit for one step, from the size of the spectrum."""
    top, mean = spectrum.eigenvalues_BD.amax(dim=1).mean(), spectrum.eigenvalues_BD.mean()
    if name == "chebyshev":
        return torch.stack([mean / 10, top])
    return torch.stack([1 / top, 0.1 / top]) if name.startswith("gd++") else torch.stack([1 / top])


def _spread(shared: dict[str, list[float]], steps: int) -> Tensor:
    factors = torch.linspace(0.8, 1.25, steps, dtype=torch.float64) if steps > 1 else torch.ones(1).double()
    rates = torch.tensor(shared["rates"], dtype=torch.float64) * factors
    return torch.cat([rates, torch.tensor(shared.get("shrinks", []), dtype=torch.float64)])


def _one_more(parameters: dict[str, list[float]]) -> Tensor:
    """The solution with one step fewer, and a further step of a hundredth of its last."""
    return torch.tensor([x for xs in parameters.values() for x in (*xs, xs[-1] / 100)], dtype=torch.float64)


def _values(name: str, parameters: dict[str, list[float]]) -> Tensor:
    """The fitted values of a solution whose steps share them."""
    if name == "chebyshev":
        low, high = parameters["interval"]
        return torch.tensor([low, high - low], dtype=torch.float64)
    return torch.tensor([values[0] for values in parameters.values()], dtype=torch.float64)


def _split(name: str, steps: int, values: Tensor) -> tuple[Tensor, Tensor | None]:
    """(rates, shrinks) of all steps."""
    if name == "chebyshev":
        return chebyshev_rates(steps, values[0], values[0] + values[1]), None
    each = 1 if not name.endswith("per step") else steps
    rates = values[:each].expand(steps)
    return rates, values[each:].expand(steps) if name.startswith("gd++") else None


def _residual(name: str, steps: int, values: Tensor) -> Residual:
    if name == "newton":
        return newton(steps, values[0])
    return descend(*_split(name, steps, values))


def _named(name: str, steps: int, values: Tensor) -> dict[str, list[float]]:
    if name == "newton":
        return {"scale": values.tolist()}
    if name == "chebyshev":
        return {"interval": [values[0].item(), (values[0] + values[1]).item()]}
    rates, shrinks = _split(name, steps, values)
    return {"rates": rates.tolist()} | ({} if shrinks is None else {"shrinks": shrinks.tolist()})


def solved_weights(tasks: Tasks, residual: Residual) -> Tensor:
    """Weights w = q(S) X^T y that a solver ends at, [B, D] in float64; also d yhat / d x_q of its prediction."""
    tasks = tasks.double()
    s_BD, vectors_BDD = torch.linalg.eigh(tasks.x_BTD.mT @ tasks.x_BTD)
    s_BD = s_BD.clamp(min=1e-10)
    moment_BD1 = vectors_BDD.mT @ (tasks.x_BTD.mT @ tasks.y_BT[..., None])
    return (vectors_BDD @ (((1 - residual(s_BD)) / s_BD)[..., None] * moment_BD1))[..., 0]


def predict(tasks: Tasks, residual: Residual) -> Tensor:
    """Predictions x_q . q(S) X^T y of a solver on tasks, [B], in float64."""
    return (solved_weights(tasks, residual) * tasks.query_BD).sum(-1)
