"""Experiment C: in softmax regression, a step of gradient descent on x and attention on A both amount to a shift of the
target (arXiv 2304.13276); and what a trained softmax head computes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from attnzoo.attention.softmax_regression import SoftmaxRegression
from attnzoo.incontext import seeded
from attnzoo.incontext.softmax import (
    SoftmaxTasks,
    linearised_step,
    shift_bounds,
    shifted_target,
    softmax_gradient,
    softmax_head,
    softmax_hessian,
    softmax_loss,
    softmax_model,
    softmax_step,
    softmax_tasks,
)
from train.experiments.base import Experiment, ExperimentConfig, ExperimentPart, Judgement, Tick, Values
from train.experiments.figures import draw_softmax_regression
from train.experiments.gram import fit
from train.experiments.layers import thinned

SETTINGS = {
    # (n, d, ws): expected losses of null, GD, linearised, construction and trained, and the expected cosine.
    (25, 5, 0.2): (0.0422, 0.0088, 0.0099, 0.0111, 0.0116, 0.992),
    (25, 20, 0.5): (0.3058, 0.1774, 0.1749, 0.1795, 0.1941, 0.946),
}
SMALL, LARGE = SETTINGS
NAMES = ("null", "gd", "linearised", "construction", "trained")
STEPS, BATCH = 2500, 512


def derivatives(config: ExperimentConfig, tick: Tick) -> Values:
    """C1: largest errors of gradient and Hessian against central differences, in float64."""
    generator = seeded(config.seed, "softmax-regression", "derivatives")
    worst = {"gradient": 0.0, "hessian": 0.0}
    for _ in range(20):
        a_TD, x_D, b_T = _instance(9, 5, generator, scale=0.7)
        eye, h = torch.eye(5, dtype=torch.float64), 1e-5
        slopes = torch.stack([softmax_loss(a_TD, x_D + h * e, b_T) - softmax_loss(a_TD, x_D - h * e, b_T) for e in eye])
        bends = torch.stack(
            [softmax_gradient(a_TD, x_D + h * e, b_T) - softmax_gradient(a_TD, x_D - h * e, b_T) for e in eye]
        )
        errors = {
            "gradient": slopes / (2 * h) - softmax_gradient(a_TD, x_D, b_T),
            "hessian": bends / (2 * h) - softmax_hessian(a_TD, x_D, b_T),
        }
        for name, error in errors.items():
            worst[name] = max(worst[name], error.abs().max().item())
        tick()
    return worst


def _instance(rows: int, dim: int, generator: torch.Generator, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    a_TD = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    x_D = torch.randn(dim, generator=generator, dtype=torch.float64)
    b_T = torch.rand(rows, generator=generator, dtype=torch.float64)
    # The assumptions of the theorem: |A| <= R in operator norm, |x| <= R.
    a_TD = a_TD * (scale / torch.linalg.matrix_norm(a_TD, 2)) * torch.rand((), generator=generator) ** 0.1
    x_D = x_D * (scale / x_D.norm()) * torch.rand((), generator=generator) ** 0.1
    return a_TD, x_D, b_T / b_T.sum()


def closeness(config: ExperimentConfig, tick: Tick) -> Values:
    """C2, C3: the shifted target on random instances, and its shift relative to both bounds."""
    generator = seeded(config.seed, "softmax-regression", "closeness")
    found: list[dict[str, float]] = []
    identity = 0.0
    for index in range(config.tasks(800)):
        rows, dim = (4, 9, 25)[index % 3], (2, 5)[index % 2]
        radius = (1.0, 2.0, 4.0)[index % 3]
        a_TD, x_D, b_T = _instance(rows, dim, generator, radius)
        bounds, before_T = shift_bounds(rows, radius), softmax_model(a_TD, x_D)
        step_D = -0.5 * softmax_gradient(a_TD, x_D, b_T)
        moved_D = _within(x_D + step_D, radius)
        # One softmax self-attention layer over the rows of A, and back into the ball.
        qk_DD = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
        v_DD = 0.1 * torch.randn(dim, dim, generator=generator, dtype=torch.float64)
        moved_TD = a_TD + torch.softmax(a_TD @ qk_DD @ a_TD.mT, dim=-1) @ a_TD @ v_DD
        norm = torch.linalg.matrix_norm(moved_TD, 2)
        moved_TD = moved_TD * min(1.0, radius / norm.item())
        ways = {
            "x": (softmax_model(a_TD, moved_D), (moved_D - x_D).norm()),
            "A": (softmax_model(moved_TD, x_D), torch.linalg.matrix_norm(moved_TD - a_TD, 2)),
        }
        for what, (after_T, way) in ways.items():
            target_T = shifted_target(b_T, before_T, after_T)
            identity = max(identity, ((after_T - b_T).norm() - (before_T - target_T).norm()).abs().item())
            shift, distance = (target_T - b_T).norm().item(), way.item()
            if distance > 1e-9:  # smaller steps are rounding errors
                row = {"radius": radius, "rows": float(rows), "moves x": float(what == "x")}
                used = {"paper": shift / (bounds.paper * distance), "tight": shift / (bounds.tight * distance)}
                found.append(row | used | {"vacuous": float(bounds.paper * distance > 2**0.5)})
        tick()
    return {"identity": identity, "instances": found}


def _within(x_D: Tensor, radius: float) -> Tensor:
    return x_D * min(1.0, radius / x_D.norm().item())


def learned(config: ExperimentConfig, tick: Tick, setting: tuple[int, int, float]) -> Values:
    """C4: losses of a trained softmax head, the best step, its linearisation and the constructed head."""
    rows, dim, spread = setting
    key = ("softmax-regression", "learned", *setting)
    layer = SoftmaxRegression(SoftmaxRegression.Config(model_dim=dim + 1))
    with torch.no_grad():
        generator = seeded(config.seed, *key, "weights")
        for parameter in layer.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    data = seeded(config.seed, *key, "data")

    def loss(step: int) -> Tensor:
        tasks = softmax_tasks(BATCH, rows, dim, spread, data)
        return (attended(layer, tasks) - tasks.target_B).square().mean()

    curve = fit(layer, loss, steps=config.steps(STEPS), rate=5e-3, tick=tick)
    fitting = softmax_tasks(config.tasks(16384), rows, dim, spread, seeded(config.seed, *key, "rates"))
    test = softmax_tasks(config.tasks(65536), rows, dim, spread, seeded(config.seed, *key, "test"))
    rates = {"gd": best(softmax_step, fitting), "linearised": best(linearised_step, fitting)}
    rates["construction"] = best(softmax_head, fitting, 2)
    with torch.no_grad():
        predictions = {
            "null": torch.ones_like(test.target_B),
            "gd": softmax_step(test, *rates["gd"]),
            "linearised": linearised_step(test, *rates["linearised"]),
            "construction": softmax_head(test, *rates["construction"]),
            "trained": attended(layer, test),
        }
    trained = predictions["trained"]
    return {
        "curve": thinned(curve),
        "losses": {name: (p - test.target_B).square().mean().item() for name, p in predictions.items()},
        "cosines": {n: _cosine(predictions[n] - 1, trained - 1) for n in ("gd", "linearised", "construction")},
        "rates": rates,
    }


def attended(layer: SoftmaxRegression, tasks: SoftmaxTasks) -> Tensor:
    """Predictions [B]: 1 + the last coordinate of the query's token."""
    e_BTE = tasks.tokens()
    return 1 + (e_BTE + layer(e_BTE))[:, -1, -1]


def best(predict: Callable[..., Tensor], tasks: SoftmaxTasks, count: int = 1) -> list[float]:
    """The `count` positive parameters with the least mean squared error on tasks, found with L-BFGS on their
    logarithms. The first is a rate; the others begin at 1."""
    free = torch.zeros(count, requires_grad=True)
    with torch.no_grad():  # the rate at which predictions move about a third as much as targets do
        moved = (predict(tasks, 1e-3, *[1.0] * (count - 1)) - 1).norm() / 1e-3
        free[0] = ((tasks.target_B - 1).norm() / moved).log() - 1
    optimiser = torch.optim.LBFGS([free], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimiser.zero_grad()
        loss = (predict(tasks, *free.exp()) - tasks.target_B).square().mean()
        loss.backward()
        return loss.item()

    optimiser.step(closure)
    return free.exp().tolist()


def _cosine(a_B: Tensor, b_B: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a_B, b_B, dim=0).item()


def parts(config: ExperimentConfig) -> dict[str, ExperimentPart]:
    """The parts: derivatives, closeness, and a trained head for each setting."""
    found = {"derivatives": ExperimentPart(derivatives, 20), "closeness": ExperimentPart(closeness, config.tasks(800))}
    for setting in SETTINGS:
        found[_name(setting)] = ExperimentPart(partial(learned, setting=setting), config.steps(STEPS))
    return found


def _name(setting: tuple[int, int, float]) -> str:
    return "n={}, d={}, ws={:g}".format(*setting)


def judge(config: ExperimentConfig, values: dict[str, Values]) -> Judgement:
    """The claims C1 to C5."""
    out, found = Judgement(), values["derivatives"]
    out.add("C1 gradient against central differences", 0.0, found["gradient"], 1e-9)
    out.add("C1 Hessian against central differences", 0.0, found["hessian"], 1e-9)
    instances = values["closeness"]["instances"]
    out.add("C2 | |f(x') - b| - |f(x) - b~| |, largest", 0.0, values["closeness"]["identity"], 1e-12)
    for part, moved in (("x", 1.0), ("A", 0.0)):
        chosen = [row for row in instances if row["moves x"] == moved]
        out.add(f"C2 |b~ - b| / (M |move of {part}|), largest", 1.0, max(r["paper"] for r in chosen), 0.0, "at_most")
        out.add(f"C3 |b~ - b| / (R/2 |move of {part}|), largest", 1.0, max(r["tight"] for r in chosen), 0.0, "at_most")
    rows = []
    for radius in (1.0, 2.0, 4.0):
        chosen = [row for row in instances if row["radius"] == radius]
        rows.append(
            {
                "R": radius,
                "instances": len(chosen),
                "largest share of the paper's bound": max(r["paper"] for r in chosen),
                "largest share of the bound R/2": max(r["tight"] for r in chosen),
                "paper's bound above sqrt(2)": sum(r["vacuous"] for r in chosen) / len(chosen),
            }
        )
    out.table("C: how much of the bounds is used", rows)
    _judge_learned(out, values)
    return out


def _judge_learned(out: Judgement, values: dict[str, Values]) -> None:
    rows = []
    for setting in SETTINGS:
        found = values[_name(setting)]
        rows.append(
            {"setting": _name(setting), **found["losses"]} | {f"cosine to {k}": v for k, v in found["cosines"].items()}
        )
    out.table("C: losses of a trained softmax head", rows)
    for setting, (*expected, cosine) in SETTINGS.items():
        found = values[_name(setting)]
        for name, value in zip(NAMES, expected, strict=True):
            last = name == "trained"  # longer training may end lower
            measured = found["losses"][name] / value
            out.add(f"C4 {_name(setting)}: {name} / {value}", 1.0, measured, 0.05, "at_most" if last else "equal")
        reached = found["cosines"]["construction"]
        out.add(f"C4 {_name(setting)}: cosine to the construction", cosine, reached, 0.01, "at_least")
    gaps = []
    for setting in (SMALL, LARGE):
        cosines = values[_name(setting)]["cosines"]
        gaps.append(cosines["linearised"] - cosines["gd"])
    for setting, gap in zip((SMALL, LARGE), gaps, strict=True):
        out.add(f"C5 {_name(setting)}: cosine to the linearised less to the exact step", 0.0, gap, 0.0, "at_least")
    out.add("C5 that difference at the larger ws over the smaller", 2.0, gaps[1] / gaps[0], 0.0, "at_least")


def draw(values: dict[str, Values], directory: Path) -> list[Path]:
    """Draws the figure."""
    return [draw_softmax_regression(values, directory)]


EXPERIMENT = Experiment("softmax-regression", "C", "Softmax regression and weight shifting", parts, judge, draw)
