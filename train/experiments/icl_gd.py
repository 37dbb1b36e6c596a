"""Experiment A: one layer of linear self-attention learns one step of gradient descent (arXiv 2212.07677).

Inputs are U(-1, 1)^10 (r = 1, as the paper's text says; its code draws r = .5, and losses scale with r^2), N = 10
examples, w ~ N(0, I), no noise. With `variant`, the claims about the layer as a black box (A1, A3, A4, A5) are tested
for that variant.
"""

import torch

from attnzoo.attention import build_attention
from attnzoo.attention.in_context_linear import InContextLinear
from attnzoo.incontext import (
    LinearFamily,
    Spectrum,
    Tasks,
    best_descents,
    descend,
    even_moments,
    least_squares_step,
    linear_tasks,
    seeded,
)
from attnzoo.incontext.descent import Residual, solved_weights
from train.experiments.base import ExperimentConfig, Tick, Values
from train.experiments.gram import GramAttention, fit, half_square
from train.experiments.layers import VariantLayers, mean_cosine, sensitivity, thinned

FAMILY = LinearFamily(dim=10, examples=10, radius=1.0)
WIDTH = FAMILY.dim + 1
BATCH, TESTED, SPECTRA = 1024, 4096, 4096
DAMPING, APPLIED = 0.75, (1, 2, 5, 10, 20, 50)
MIXED = (0.0, 0.25, 0.5, 0.75, 1.0)
STD = 1e-4
"""Standard deviation of initial weights. In one layer the y row of W_QK and the x columns of W_VP get no gradient and
keep their initial values. When the layer is applied to its own output they make x grow like its cube; with 0.002 it
diverges within 50 applications."""

SHIFTS: list[tuple[str, dict]] = [
    *((f"x range {radius:g}", {"radius": radius}) for radius in (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)),
    *((f"w scale {scale:g}", {"weights": scale}) for scale in (0.5, 1.0, 2.0, 3.0, 5.0)),
    *((f"{law} x", {"inputs": law}) for law in ("normal", "laplace", "exponential", "binary", "sparse")),
    *((f"noise variance {noise:g}", {"noise": noise}) for noise in (0.1, 0.25, 0.5, 1.0)),
]


def test_tasks(config: ExperimentConfig) -> Tasks:
    """The test tasks of this experiment."""
    return linear_tasks(config.tasks(TESTED), FAMILY, seeded(config.seed, "icl-gd", "test"))


def one_step_rate() -> float:
    """The best learning rate a* of one step for `FAMILY`, in closed form."""
    return least_squares_step(FAMILY.dim, FAMILY.examples, *even_moments("uniform", FAMILY.radius)).rate


def model_for(config: ExperimentConfig, depth: int, key: str, std: float = STD) -> GramAttention | VariantLayers:
    """A model of looped layers: linear attention in Gram form, or the variant in the configuration."""
    generator = seeded(config.seed, "icl-gd", key, "weights")
    if config.variant is None:
        return GramAttention(WIDTH, depth, looped=True, std=std, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed() % 2**31)
        return VariantLayers(config.variant, config.options, WIDTH, depth, looped=True)


def learn(
    config: ExperimentConfig, model: torch.nn.Module, key: str, steps: int, rate: float, tick: Tick, batch: int = BATCH
) -> list[float]:
    """Trains on new tasks in every step; returns the losses."""
    data = seeded(config.seed, "icl-gd", key, "data")
    rate = rate if config.variant is None else 3e-3

    def loss(step: int) -> torch.Tensor:
        tasks = linear_tasks(batch, FAMILY, data)
        return half_square(model(tasks), tasks.target_B)

    return fit(model, loss, steps=config.steps(steps), rate=rate, tick=tick)


def solver_loss(tasks: Tasks, residual: Residual) -> float:
    """Loss of a solver on tasks."""
    weights_BD = solved_weights(tasks, residual)
    return half_square((weights_BD * tasks.query_BD).sum(-1), tasks.target_B.double()).item()


@torch.no_grad()
def model_loss(model: torch.nn.Module, tasks: Tasks, **how: float) -> float:
    """Loss of a model on tasks."""
    return half_square(model(tasks, **how), tasks.target_B).item()


def one_layer(config: ExperimentConfig, tick: Tick) -> Values:
    """A1 to A4: trains and measures one layer."""
    model = model_for(config, 1, "one")
    curve = learn(config, model, "one", 2000, 0.01, tick, batch=2 * BATCH)
    tasks, rate = test_tasks(config), one_step_rate()
    step = descend(torch.tensor([rate], dtype=torch.float64))
    weights_BD = solved_weights(tasks, step)
    with torch.no_grad():
        difference_B = (model(tasks) - (weights_BD * tasks.query_BD).sum(-1)).abs()
    found = {
        "curve": thinned(curve),
        "loss": model_loss(model, tasks),
        "gd": solver_loss(tasks, step),
        "optimum": least_squares_step(FAMILY.dim, FAMILY.examples, *even_moments("uniform", FAMILY.radius)).loss,
        "rate": rate,
        "cosine": mean_cosine(sensitivity(model, tasks), weights_BD),
        "difference": difference_B.mean().item(),
        "shifts": shifted(config, model, step),
        "applied": applied(model, tasks, rate),
    }
    if isinstance(model, GramAttention):
        found |= weights_of_one_layer(model, tasks, rate)
    return found


@torch.no_grad()
def weights_of_one_layer(model: GramAttention, tasks: Tasks, rate: float) -> Values:
    """The learned rate (A1), the interpolation (A2), and the largest difference to predictions of `InContextLinear`
    with the trained weights."""
    qk_EE, vp_EE = model.layer(0)
    scale = qk_EE.diagonal()[:-1].mean()
    layer = InContextLinear(InContextLinear.Config(model_dim=WIDTH))
    layer.set_products(qk_EE[None], vp_EE[None])
    e_BTE = tasks.tokens()
    zoo_B = -(e_BTE + layer(e_BTE))[:, -1, -1]
    layer.set_gradient_step(rate)
    built = (layer.query_key()[0], layer.value_output()[0])
    mixed = GramAttention(WIDTH, 1, looped=True, std=0.0, generator=torch.Generator())
    losses = []
    for share in MIXED:
        mixed.qk_LEE.copy_(torch.lerp(built[0], qk_EE / scale, share)[None])
        mixed.vp_LEE.copy_(torch.lerp(built[1], vp_EE * scale, share)[None])
        losses.append(model_loss(mixed, tasks))
    return {
        "learned_rate": (vp_EE[-1, -1] * scale).item(),
        "mixed": losses,
        "zoo_difference": (zoo_B - model(tasks)).abs().max().item(),
        "learned": {"W_QK": (qk_EE / scale).tolist(), "W_VP": (vp_EE * scale).tolist()},
    }


def shifted(config: ExperimentConfig, model: torch.nn.Module, step: Residual) -> list[dict]:
    """A3: losses on other distributions, of the trained layer and of the step with the training tasks' rate."""
    rows = []
    for name, changes in SHIFTS:
        family = LinearFamily(**({"dim": FAMILY.dim, "examples": FAMILY.examples, "radius": FAMILY.radius} | changes))
        tasks = linear_tasks(config.tasks(TESTED), family, seeded(config.seed, "icl-gd", "shift", name))
        trained, gd = model_loss(model, tasks), solver_loss(tasks, step)
        rows.append({"tasks": name, "trained": trained, "gd": gd, "trained / gd": trained / gd})
    return rows


def applied(model: torch.nn.Module, tasks: Tasks, rate: float) -> list[dict]:
    """A4: losses of the layer applied repeatedly with damping, and of gradient descent with the same damping."""
    rows = []
    for times in APPLIED:
        trained = model_loss(model, tasks, depth=times, damping=DAMPING)
        gd = solver_loss(tasks, descend(torch.full((times,), DAMPING * rate, dtype=torch.float64)))
        rows.append({"applications": times, "trained": trained, "damped gd": gd, "trained / gd": trained / gd})
    return rows


def two_layers(config: ExperimentConfig, tick: Tick) -> Values:
    """A5: two recurrent layers, against two steps of GD and GD++."""
    model = model_for(config, 2, "two", std=0.02)
    curve = learn(config, model, "two", 4000, 0.01, tick)
    tasks = test_tasks(config)
    spectrum = Spectrum.of(config.tasks(SPECTRA), FAMILY, seeded(config.seed, "icl-gd", "spectrum"))
    solvers = {name: best_descents(name, 2, spectrum)[1] for name in ("gd", "gd++")}
    found: Values = {"curve": thinned(curve), "loss": model_loss(model, tasks)}
    slopes_BD = sensitivity(model, tasks)
    for name, solver in solvers.items():
        found[name] = {
            "loss": solver_loss(tasks, solver.residual),
            "cosine": mean_cosine(slopes_BD, solved_weights(tasks, solver.residual)),
            **solver.parameters,
        }
    return found


def softmax_heads(config: ExperimentConfig, tick: Tick, heads: int) -> Values:
    """A6: a layer of softmax attention instead of linear attention."""
    model = _softmax_layer(config, heads)
    curve = learn(config, model, f"softmax {heads}", 3000, 0.01, tick, batch=BATCH // 2)
    return {"curve": thinned(curve), "loss": model_loss(model, test_tasks(config))}


def _softmax_layer(config: ExperimentConfig, heads: int) -> VariantLayers:
    build_attention("softmax_regression", {"model_dim": WIDTH})  # a wrong name fails before training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded(config.seed, "icl-gd", "softmax", heads).initial_seed() % 2**31)
        options = {"num_heads": heads}
        return VariantLayers("softmax_regression", options, WIDTH, 1, looped=True, inner_dim=None, std=0.2)
