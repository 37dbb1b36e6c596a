"""Experiment B: one step of gradient descent is optimal for one layer of linear self-attention (arXiv 2307.03576).

The layer predicts u . G M x_q with G = sum_j v_j v_j^T, v_j = (x_j, y_j): u is a row of the value map, M the first
columns of W_QK. n = 8 examples, d = 4; losses are mean squared errors, not halved.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from attnzoo.incontext import (
    LinearFamily,
    Tasks,
    gaussian_step,
    linear_tasks,
    mixed_preconditioner,
    odd_function_step,
    seeded,
)
from train.experiments.base import Experiment, ExperimentConfig, ExperimentPart, Judgement, Tick, Values
from train.experiments.figures import draw_one_step
from train.experiments.gram import fit
from train.experiments.layers import thinned

DIM, EXAMPLES = 4, 8
SPREAD = (4.0, 2.0, 1.0, 0.25)
NOISES = (0.0, 0.5)
TESTED, STEPS, BATCH, STARTS = 2**21, 1500, 4096, 4


@dataclass(frozen=True)
class Case:
    """A family of tasks: y as a function of x, the covariance of x, the distribution of w, the noise's variance."""

    claim: str
    name: str
    covariance: tuple[float, ...]
    weights: str = "unit"
    function: str = "linear"
    noise: float = 0.0

    @property
    def key(self) -> str:
        """Name of the part."""
        return f"{self.name}, noise {self.noise:g}"

    def optimum(self) -> tuple[Tensor, float]:
        """(Gamma_DD, L*): the best step x_q^T Gamma X^T y, in closed form."""
        variances_D = torch.tensor(self.covariance, dtype=torch.float64)
        if self.function == "even":
            # E (w.x)^4 = 3 E |w|^4 = 3 d (d + 2): no step helps, and the loss is that of predicting 0.
            return torch.zeros(DIM, DIM, dtype=torch.float64), 3.0 * DIM * (DIM + 2) + self.noise
        if self.function == "odd":
            step = odd_function_step(DIM, EXAMPLES, self.noise)
            return step.rate * torch.eye(DIM, dtype=torch.float64), step.loss
        if self.weights == "inverse":
            step = gaussian_step(DIM, EXAMPLES, self.noise)
            return step.rate * torch.diag(1 / variances_D), step.loss
        return mixed_preconditioner(variances_D, EXAMPLES, self.noise)

    def draw(self, batch: int, generator: torch.Generator) -> Tasks:
        """Draws tasks of the family."""
        family = LinearFamily(
            dim=DIM,
            examples=EXAMPLES,
            inputs="normal",
            covariance=self.covariance,
            weights="inverse" if self.weights == "inverse" else 1.0,
            noise=0.0 if self.function != "linear" else self.noise,
        )
        tasks = linear_tasks(batch, family, generator)
        if self.function == "linear":
            return tasks
        sign_B = torch.randint(0, 2, (batch,), generator=generator) * 2.0 - 1.0
        y_BT, target_B = (self._bent(y, sign_B, generator) for y in (tasks.y_BT, tasks.target_B))
        return Tasks(tasks.x_BTD, y_BT, tasks.query_BD, target_B)

    def _bent(self, y: Tensor, sign_B: Tensor, generator: torch.Generator) -> Tensor:
        noise = self.noise**0.5 * torch.randn(y.shape, generator=generator)
        if self.function == "even":
            return y.square() + noise
        return sign_B.view(-1, *[1] * (y.dim() - 1)) * y.relu() + noise


CASES = [
    *(Case("B1", "x ~ N(0, I)", (1.0,) * DIM, noise=noise) for noise in NOISES),
    *(Case("B2", "x ~ N(0, S), w ~ N(0, 1/S)", SPREAD, weights="inverse", noise=noise) for noise in NOISES),
    *(Case("B3", "x ~ N(0, S), w ~ N(0, I)", SPREAD, noise=noise) for noise in NOISES),
    *(Case("B4", "y = +-relu(w.x)", (1.0,) * DIM, function="odd", noise=noise) for noise in NOISES),
    Case("B5", "y = (w.x)^2", (1.0,) * DIM, function="even"),
]


class OneLayer(nn.Module):
    """The layer u . G M x_q, with `STARTS` initial weights trained at once.

    The theorem is about the global minimum, but training has local minima: with a skewed covariance u may read the
    leading input instead of y, (sum_j x_j1 y_j) m x_q1, which regresses on that input alone.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.u_RE = nn.Parameter(0.05 * torch.randn(STARTS, DIM + 1, generator=generator))
        self.m_RED = nn.Parameter(0.05 * torch.randn(STARTS, DIM + 1, DIM, generator=generator))

    def forward(self, tasks: Tasks) -> Tensor:
        """Predictions [R, B] of the R initialisations."""
        read_BRE = self.u_RE @ tasks.gram()
        return torch.einsum("bre,red,bd->rb", read_BRE, self.m_RED, tasks.query_BD)

    @torch.no_grad()
    def effective(self, start: int) -> Tensor:
        """The function of a layer as coefficients [E, E, D] of G_ab x_q,c, symmetric in a and b as G is."""
        coefficients = self.u_RE[start][:, None, None] * self.m_RED[start][None]
        return 0.5 * (coefficients + coefficients.transpose(0, 1)).double()


def effective_step(gamma_DD: Tensor) -> Tensor:
    """The coefficients of x_q^T Gamma X^T y, as in `OneLayer.effective`."""
    coefficients = torch.zeros(DIM + 1, DIM + 1, DIM, dtype=torch.float64)
    coefficients[-1, :-1] = coefficients[:-1, -1] = gamma_DD / 2
    return coefficients


def measure(config: ExperimentConfig, tick: Tick, case: Case) -> Values:
    """Trains one layer on a family, and measures its loss and its distance from the best step."""
    model = OneLayer(seeded(config.seed, "one-step-gd", case.key, "weights"))
    data = seeded(config.seed, "one-step-gd", case.key, "data")
    unit = case.optimum()[1]

    def loss(step: int) -> Tensor:
        tasks = case.draw(BATCH, data)
        return (model(tasks) - tasks.target_B).square().mean() / unit

    curve = [value * unit for value in fit(model, loss, steps=config.steps(STEPS), rate=0.01, tick=tick, clip=10.0)]
    gamma_DD, best = case.optimum()
    with torch.no_grad():
        chosen = case.draw(config.tasks(2**16), seeded(config.seed, "one-step-gd", case.key, "choice"))
        losses_R = (model(chosen) - chosen.target_B).square().mean(dim=1)
    start = int(losses_R.argmin())
    errors = {"trained": 0.0, "step": 0.0, "null": 0.0}
    test, total = seeded(config.seed, "one-step-gd", case.key, "test"), config.tasks(TESTED)
    chunk = min(total, 2**16)
    with torch.no_grad():
        for _ in range(total // chunk):
            tasks = case.draw(chunk, test)
            moment_BD = (tasks.x_BTD.mT @ tasks.y_BT[..., None])[..., 0]
            step_B = (moment_BD @ gamma_DD.float() * tasks.query_BD).sum(-1)
            for name, prediction_B in (("trained", model(tasks)[start]), ("step", step_B), ("null", 0 * step_B)):
                errors[name] += (prediction_B - tasks.target_B).square().mean().item() * chunk / total
    learned, expected = model.effective(start), effective_step(gamma_DD)
    scale = expected.norm() if expected.any() else effective_step(torch.eye(DIM, dtype=torch.float64)).norm()
    return {
        "curve": thinned(curve),
        "loss": errors["trained"],
        "step": errors["step"],
        "null": errors["null"],
        "optimum": best,
        "starts": (losses_R < 1.05 * losses_R.min()).float().mean().item(),
        "distance": ((learned - expected).norm() / scale).item(),
        "learned": (2 * learned[-1, :-1]).tolist(),
        "gamma": gamma_DD.tolist(),
    }


def parts(config: ExperimentConfig) -> dict[str, ExperimentPart]:
    """One part for each family."""
    return {case.key: ExperimentPart(partial(measure, case=case), config.steps(STEPS)) for case in CASES}


def judge(config: ExperimentConfig, values: dict[str, Values]) -> Judgement:
    """The claims. B1 to B4: loss within 1 % of L*, effective matrix within 3 %; B5: no step is learned."""
    out, rows = Judgement(), []
    for case in CASES:
        found, best = values[case.key], values[case.key]["optimum"]
        rows.append(
            {
                "family": case.key,
                **{key: found[key] for key in ("null", "optimum", "step", "loss", "distance", "starts")},
            }
        )
        if case.function == "even":
            out.add(f"{case.claim} {case.key}: size of the learned step", 0.0, found["distance"], 0.005)
            continue
        out.add(f"{case.claim} {case.key}: loss / L*", 1.0, found["loss"] / best, 0.01)
        out.add(f"{case.claim} {case.key}: relative distance from the best step", 0.0, found["distance"], 0.03)
    out.table("B: one layer against the best step", rows)
    return out


def draw(values: dict[str, Values], directory: Path) -> list[Path]:
    """Draws the figure."""
    return [draw_one_step(values, directory)]


EXPERIMENT = Experiment("one-step-gd", "B", "One step of gradient descent is optimal", parts, judge, draw)
