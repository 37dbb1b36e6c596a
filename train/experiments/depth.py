"""Experiment D: what does an attention variant compute in context, by depth, noise and covariance?

The first part compares linear attention of 1 to 8 layers, looped and stacked, with gradient descent, GD++, Chebyshev
and Newton. The second trains several variants on the same tasks and compares their predictions with known algorithms.
"""

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.attention import ATTENTION, build_attention
from attnzoo.attention.mesa import Mesa
from attnzoo.incontext import (
    LinearFamily,
    Spectrum,
    Tasks,
    best_descents,
    linear_tasks,
    mixed_preconditioner,
    ridge,
    seeded,
)
from attnzoo.incontext.descent import SOLVERS, predict
from train.experiments.base import Experiment, ExperimentConfig, ExperimentPart, Judgement, Tick, Values
from train.experiments.figures import draw_depth, draw_variants
from train.experiments.gram import GramAttention, fit, half_square
from train.experiments.layers import thinned

MOST = 8
DESCENT = LinearFamily(dim=10, examples=10, radius=1.0)
LAYER_STEPS, LAYER_BATCH = 400, 512
DIM, EXAMPLES, INNER, HEADS = 5, 10, 32, 2
VARIANTS: dict[str, dict[str, Any]] = {
    "mha": {},
    "rmha": {"max_distance": EXAMPLES + 1},
    "rcmha": {"max_distance": EXAMPLES + 1},
    "linear": {"normalise": False, "decay": False, "feature_map": "identity"},
    "mesa": {},
}
TASKS = {
    "clean": LinearFamily(dim=DIM, examples=EXAMPLES, inputs="normal", covariance=(1.0,) * DIM),
    "noisy": LinearFamily(dim=DIM, examples=EXAMPLES, inputs="normal", covariance=(1.0,) * DIM, noise=0.5),
    "skewed": LinearFamily(
        dim=DIM, examples=EXAMPLES, inputs="normal", covariance=(3.0, 1.0, 0.6, 0.3, 0.1), noise=0.1
    ),
}
DEPTHS = (1, 2)
STDS = {"linear": 0.07}
"""Standard deviation of initial weights where it is not 0.2: two unnormalised linear layers are a polynomial of degree
9, whose values would begin at 10^4."""
VARIANT_STEPS, VARIANT_BATCH = 300, 128


def most(config: ExperimentConfig) -> int:
    """The largest number of layers."""
    return 3 if config.quick else MOST


def descent_tasks(config: ExperimentConfig) -> Tasks:
    """The tasks on which linear attention and solvers are compared."""
    return linear_tasks(config.tasks(8192), DESCENT, seeded(config.seed, "depth", "test"))


def typical(prediction_B: Tensor, target_B: Tensor) -> float:
    """Half the mean squared error over the 99 % of tasks with the smallest errors. Many layers, or many steps of GD++,
    are polynomials of high degree that overflow on rare contexts, which would dominate a mean over all tasks."""
    errors_B = (prediction_B - target_B).double().square().nan_to_num(nan=math.inf)
    return 0.5 * errors_B.sort().values[: int(0.99 * len(errors_B))].mean().item()


def known_losses(config: ExperimentConfig, tick: Tick) -> Values:
    """Losses of the best solvers of 1 to 8 steps for the tasks of experiment A, fitted to spectra, on the tasks of
    `layers`."""
    tasks = descent_tasks(config)
    spectrum = Spectrum.of(config.tasks(4096), DESCENT, seeded(config.seed, "depth", "spectrum"))
    found = {}
    for name in SOLVERS:
        solvers = best_descents(name, most(config), spectrum)
        found[name] = [typical(predict(tasks, s.residual), tasks.target_B.double()) for s in solvers]
        tick()
    return found


def layers(config: ExperimentConfig, tick: Tick, looped: bool) -> Values:
    """Losses of linear attention trained at every depth. Each depth begins with the weights of the depth before; the
    new layer first does almost nothing (stacked) or has the shared weights (looped)."""
    key = ("depth", "looped" if looped else "stacked")
    tasks = descent_tasks(config)
    losses, curves = [], []
    before: GramAttention | None = None
    for depth in range(1, most(config) + 1):
        weights = seeded(config.seed, *key, depth, "weights")
        model = GramAttention(DESCENT.dim + 1, depth, looped=looped, std=0.02, generator=weights)
        if before is not None:
            with torch.no_grad():
                known = len(before.qk_LEE)
                model.qk_LEE[:known].copy_(before.qk_LEE)
                model.vp_LEE[:known].copy_(before.vp_LEE)
                model.vp_LEE[known:] *= 0.1
        data = seeded(config.seed, *key, depth, "data")

        def loss(step: int, model: GramAttention = model, data: torch.Generator = data) -> Tensor:
            drawn = linear_tasks(LAYER_BATCH, DESCENT, data)
            return half_square(model(drawn), drawn.target_B)

        # The second layer must learn to transform x, which takes longest; deeper models begin with that.
        steps = config.steps(LAYER_STEPS * (3 if depth == 2 else 1))
        rate = 0.01 if depth <= 2 else 0.003 if looped and depth <= 6 else 0.001
        try:
            curves.append(thinned(fit(model, loss, steps=steps, rate=rate, tick=tick), 30))
        except RuntimeError:  # stacked layers overflow on rare contexts: this depth and deeper ones are not measured
            losses += [math.nan] * (most(config) + 1 - depth)
            break
        with torch.no_grad():
            losses.append(typical(model(tasks), tasks.target_B))
        before = model
    return {"loss": losses, "curves": curves}


class PairLayers(nn.Module):
    """A model on tokens (x_t, x_{t-1}, y_{t-1}): each token has an input and the pair before it, so that causal
    attention never sees the y that it must predict. A linear map, `depth` residual layers of a variant, and a linear
    map give a prediction at every token."""

    def __init__(self, kind: str, options: dict[str, Any], depth: int) -> None:
        super().__init__()
        fields = {field.name for field in dataclasses.fields(ATTENTION.get(kind).Config)}
        heads = {"num_heads": HEADS} if "num_heads" in fields else {}
        self.read = nn.Linear(2 * DIM + 1, INNER, bias=False)
        layers = [build_attention(kind, {"model_dim": INNER} | heads | options, kind) for _ in range(depth)]
        for layer in layers:
            layer.reset_parameters(STDS.get(kind, 0.2), STDS.get(kind, 0.2) / depth)
        self.layers = nn.ModuleList(layers)
        self.write = nn.Linear(INNER, 1, bias=False)

    def forward(self, tasks: Tasks) -> Tensor:
        """Predictions [B, T + 1] of y_1, ..., y_T, y_q, each from the pairs before it."""
        x_BTD = torch.cat([tasks.x_BTD, tasks.query_BD[:, None]], dim=1)
        pairs_BTE = torch.cat([tasks.x_BTD, tasks.y_BT[..., None]], dim=2)
        pairs_BTE = torch.nn.functional.pad(pairs_BTE, (0, 0, 1, 0))
        h_BTE = self.read(torch.cat([x_BTD, pairs_BTE], dim=2))
        for layer in self.layers:
            h_BTE = h_BTE + layer(h_BTE)
        out: Tensor = self.write(h_BTE)[..., 0]
        return out


def algorithms(family: LinearFamily, tasks: Tasks, config: ExperimentConfig) -> dict[str, Tensor]:
    """The query predictions of known algorithms, float64 [B], by algorithm."""
    spectrum = Spectrum.of(config.tasks(4096), family, seeded(config.seed, "depth", "variants", "spectrum"))
    exact = tasks.double()
    gamma_DD, _ = mixed_preconditioner(family.variances(), family.examples, family.noise)
    moment_BD = (exact.x_BTD.mT @ exact.y_BT[..., None])[..., 0]
    found = {"nothing": torch.zeros_like(exact.target_B), "a step": (moment_BD @ gamma_DD * exact.query_BD).sum(-1)}
    for name, label in (("gd per step", "gd, 3 steps"), ("gd++ per step", "gd++, 3 steps")):
        found[label] = predict(tasks, best_descents(name, 3, spectrum)[2].residual)
    found["ridge (Bayes)"] = ridge(exact, max(family.noise, 1e-9))
    if family.noise:
        found["least squares"] = ridge(exact, 1e-9)
    return found


def variant(config: ExperimentConfig, tick: Tick, kind: str, options: dict[str, Any], name: str, depth: int) -> Values:
    """Trains one variant of one depth on one family of tasks: its loss, and the distances to known algorithms."""
    family, key = TASKS[name], ("depth", "variants", kind, name, depth)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded(config.seed, *key, "weights").initial_seed() % 2**31)
        model = PairLayers(kind, options, depth)
    data = seeded(config.seed, *key, "data")

    def loss(step: int) -> Tensor:
        tasks = linear_tasks(VARIANT_BATCH, family, data)
        targets_BT = torch.cat([tasks.y_BT, tasks.target_B[:, None]], dim=1)
        return half_square(model(tasks), targets_BT)

    curve = fit(model, loss, steps=config.steps(VARIANT_STEPS), rate=4e-3, tick=tick)
    tasks = linear_tasks(config.tasks(8192), family, seeded(config.seed, "depth", "variants", name, "test"))
    with torch.no_grad():
        ours_B = torch.cat(
            [model(_rows(tasks, first))[:, -1] for first in range(0, len(tasks.target_B), 1024)]
        ).double()
    known, spread = algorithms(family, tasks, config), tasks.target_B.double().square().mean()
    return {
        "curve": thinned(curve, 40),
        "loss": half_square(ours_B, tasks.target_B.double()).item(),
        "losses": {label: half_square(p, tasks.target_B.double()).item() for label, p in known.items()},
        "distances": {label: ((ours_B - p).square().mean() / spread).item() for label, p in known.items()},
    }


def _rows(tasks: Tasks, first: int) -> Tasks:
    """A chunk of 1,024 tasks: a mesa layer holds a matrix for each token."""
    return Tasks(*(getattr(tasks, field.name)[first : first + 1024] for field in dataclasses.fields(tasks)))


def mesa_is_ridge(config: ExperimentConfig, tick: Tick) -> Values:
    """Compares a mesa head with constructed weights, ridge regression and least squares on noisy tasks."""
    family = TASKS["noisy"]
    tasks = linear_tasks(config.tasks(8192), family, seeded(config.seed, "depth", "mesa")).double()
    width = 2 * DIM + 1
    layer = Mesa(Mesa.Config(model_dim=width, num_heads=1, head_dim=DIM, ridge=family.noise)).double()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.fill_(math.log(family.noise) if name == "mixing.log_ridge" else 0.0)
        layer.projection.query.weight[:, :DIM] = torch.eye(DIM)
        layer.projection.key.weight[:, DIM : 2 * DIM] = torch.eye(DIM)
        layer.projection.value.weight[0, -1] = 1.0
        layer.projection.output.weight[-1, 0] = 1.0
        x_BTD = torch.cat([tasks.x_BTD, tasks.query_BD[:, None]], dim=1)
        pairs_BTE = torch.cat([tasks.x_BTD, tasks.y_BT[..., None]], dim=2)
        e_BTE = torch.cat([x_BTD, torch.nn.functional.pad(pairs_BTE, (0, 0, 1, 0))], dim=2)
        mesa_B = layer(e_BTE)[:, -1, -1]
    bayes_B, squares_B = ridge(tasks, family.noise), ridge(tasks, 1e-9)
    tick()
    return {
        "difference": (mesa_B - bayes_B).abs().max().item(),
        "mesa": half_square(mesa_B, tasks.target_B).item(),
        "least squares": half_square(squares_B, tasks.target_B).item(),
    }


def parts(config: ExperimentConfig) -> dict[str, ExperimentPart]:
    """The parts: solvers, linear attention by depth, the mesa layer, and each variant by family and depth."""
    found = {
        "solvers": ExperimentPart(known_losses, len(SOLVERS)),
        "looped": ExperimentPart(partial(layers, looped=True), (most(config) + 2) * config.steps(LAYER_STEPS)),
        "stacked": ExperimentPart(partial(layers, looped=False), (most(config) + 2) * config.steps(LAYER_STEPS)),
        "mesa": ExperimentPart(mesa_is_ridge, 1),
    }
    chosen = VARIANTS | ({config.variant: config.options} if config.variant else {})
    for kind, options in chosen.items():
        for name in TASKS:
            for depth in DEPTHS:
                run = partial(variant, kind=kind, options=options, name=name, depth=depth)
                found[f"{kind} {name} {depth}"] = ExperimentPart(run, config.steps(VARIANT_STEPS))
    return found


def judge(config: ExperimentConfig, values: dict[str, Values]) -> Judgement:
    """The claims D1 to D3, and a table of the algorithm that each variant is nearest to."""
    out, solvers = Judgement(), values["solvers"]
    looped, stacked = values["looped"]["loss"], values["stacked"]["loss"]
    depths = range(len(looped))
    rows = [
        {"layers": k + 1, "looped": looped[k], "stacked": stacked[k]} | {name: solvers[name][k] for name in SOLVERS}
        for k in depths
    ]
    out.table("D: loss by depth", rows)
    trained = [k for k in depths if math.isfinite(looped[k])]
    worst = max(looped[k] / solvers["gd"][k] for k in trained)
    out.add(f"D1 looped layers / GD, worst of the {len(trained)} depths that trained", 1.0, worst, 0.01, "at_most")
    best = stacked[1] / solvers["gd++ per step"][1]
    out.add("D2 two stacked layers / GD++ with rates of their own", 1.0, best, 0.0, "at_most")
    mesa = values["mesa"]
    out.add("D3 constructed mesa layer against ridge, largest difference", 0.0, mesa["difference"], 1e-9)
    out.add(
        "D3 its loss / that of least squares, noisy tasks", 1.0, mesa["mesa"] / mesa["least squares"], 0.0, "at_most"
    )
    found = [_finding(name, part) for name, part in values.items() if "distances" in part]
    out.table("D: what does this attention compute in context?", found)
    return out


def _finding(name: str, part: Values) -> dict[str, Any]:
    kind, tasks, depth = name.rsplit(" ", 2)
    nearest = min(part["distances"], key=part["distances"].get)
    return {
        "variant": kind,
        "tasks": tasks,
        "layers": int(depth),
        "loss": part["loss"],
        "Bayes loss": part["losses"]["ridge (Bayes)"],
        "nearest algorithm": nearest,
        "distance": part["distances"][nearest],
        **{f"to {label}": value for label, value in part["distances"].items() if label in ("a step", "ridge (Bayes)")},
    }


def draw(values: dict[str, Values], directory: Path) -> list[Path]:
    """Draws losses by depth, and the distances of the variants to known algorithms."""
    return [draw_depth(values, directory), draw_variants(values, directory)]


EXPERIMENT = Experiment("depth", "D", "What does this attention compute in context?", parts, judge, draw)
