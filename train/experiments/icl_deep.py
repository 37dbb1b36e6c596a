"""Experiment A, claims 7 and 8: features from an MLP, and x and y as separate tokens (arXiv 2212.07677)."""

import torch
from torch import Tensor, nn

from attnzoo.attention.in_context_linear import InContextLinear
from attnzoo.attention.softmax_regression import SoftmaxRegression
from attnzoo.incontext import Tasks, descend, linear_tasks, seeded, sine_tasks
from train.experiments.base import ExperimentConfig, Tick, Values
from train.experiments.gram import fit, half_square
from train.experiments.icl_gd import FAMILY, WIDTH, one_step_rate, solver_loss, test_tasks
from train.experiments.layers import thinned

FEATURES, HIDDEN, SINE_EXAMPLES = 40, 160, 10
PAIRS = 2 * FAMILY.examples + 1
PAIR_WIDTH = WIDTH + PAIRS


class SineModel(nn.Module):
    """An embedding and an MLP on tokens (x, y), then one layer: trained, or constructed as a step of gradient descent.

    The constructed layer takes the last feature as the target of a regression and the others as its input; its only
    trained weight is the learning rate.
    """

    def __init__(self, *, constructed: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(2, FEATURES)
        self.mlp = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, FEATURES))
        self.layer = None if constructed else InContextLinear(InContextLinear.Config(model_dim=FEATURES))
        self.rate = nn.Parameter(torch.tensor(0.1)) if constructed else None
        if self.layer is not None:
            self.layer.reset_parameters(0.1, 0.1)

    def forward(self, tasks: Tasks) -> Tensor:
        """Predictions [B]."""
        h_BTE = self.embed(tasks.tokens())
        h_BTE = h_BTE + self.mlp(h_BTE)
        if self.layer is not None:
            return -(h_BTE + self.layer(h_BTE))[:, -1, -1]
        context_BTE, asked_BE = h_BTE[:, :-1], h_BTE[:, -1]
        likeness_BT = (context_BTE[..., :-1] @ asked_BE[:, :-1, None])[..., 0]
        return self.rate * (likeness_BT * context_BTE[..., -1]).sum(-1) - asked_BE[:, -1]


def sine(config: ExperimentConfig, tick: Tick, constructed: bool = False, start: int = 0) -> Values:
    """A7: the loss of one of the two models. start: number of the random initialisation."""
    key = ("icl-gd", "sine", *([start] if start else []))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded(config.seed, *key, "weights").initial_seed() % 2**31)
        model = SineModel(constructed=constructed)
    data = seeded(config.seed, *key, "data")

    def loss(step: int) -> Tensor:
        tasks = sine_tasks(256, SINE_EXAMPLES, data)
        return half_square(model(tasks), tasks.target_B)

    curve = fit(model, loss, steps=config.steps(2500), rate=5e-3, tick=tick)
    tasks = sine_tasks(4 * config.tasks(4096), SINE_EXAMPLES, seeded(config.seed, "icl-gd", "sine", "test"))
    with torch.no_grad():
        measured = half_square(model(tasks), tasks.target_B).item()
    return {"curve": thinned(curve), "loss": measured, "null": half_square(0 * tasks.target_B, tasks.target_B).item()}


class PairModel(nn.Module):
    """A softmax layer, then a linear one, on tokens x_1, y_1, x_2, ..., x_q with their positions (`pair_tokens`)."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.copy = SoftmaxRegression(SoftmaxRegression.Config(model_dim=PAIR_WIDTH))
        self.read = InContextLinear(InContextLinear.Config(model_dim=PAIR_WIDTH))
        self.copy.reset_parameters(std, std)
        self.read.reset_parameters(std, std)

    def forward(self, tasks: Tasks) -> Tensor:
        """Predictions [B]."""
        e_BTE = pair_tokens(tasks)
        e_BTE = e_BTE + self.copy(e_BTE)
        return -(e_BTE + self.read(e_BTE))[:, -1, WIDTH - 1]


def pair_tokens(tasks: Tasks) -> Tensor:
    """[B, 2N + 1, D + 1 + 2N + 1]: (x_j, 0), (0, y_j), ..., (x_q, 0), each with its position as a unit vector."""
    batch, examples, dim = tasks.x_BTD.shape
    e_BTE = tasks.x_BTD.new_zeros(batch, 2 * examples + 1, dim + 1)
    e_BTE[:, 0:-1:2, :dim] = tasks.x_BTD
    e_BTE[:, 1:-1:2, dim] = tasks.y_BT
    e_BTE[:, -1, :dim] = tasks.query_BD
    return torch.cat([e_BTE, torch.eye(2 * examples + 1).expand(batch, -1, -1)], dim=2)


def copied(model: PairModel, tasks: Tasks, generator: torch.Generator) -> tuple[float, float, float]:
    """How much the first layer's output at x_j depends on (its own token, the next token y_j, each other token).

    These are norms of the gradient of the output in a random direction, averaged over tasks and positions.
    """
    e_BTE = pair_tokens(tasks).requires_grad_()
    out_BTE = e_BTE + model.copy(e_BTE)
    own = following = rest = 0.0
    places = range(0, PAIRS - 1, 2)
    for place in places:
        direction_E = torch.randn(PAIR_WIDTH, generator=generator)
        direction_E = direction_E / direction_E.norm()
        (grad_BTE,) = torch.autograd.grad((out_BTE[:, place] @ direction_E).sum(), e_BTE, retain_graph=True)
        norms_T = grad_BTE.norm(dim=-1).mean(dim=0)
        own += norms_T[place].item()
        following += norms_T[place + 1].item()
        rest += (norms_T.sum() - norms_T[place] - norms_T[place + 1]).item() / (PAIRS - 2)
    return own / len(places), following / len(places), rest / len(places)


def induction(config: ExperimentConfig, tick: Tick) -> Values:
    """A8: the loss, and the sensitivities of the first layer during training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded(config.seed, "icl-gd", "pairs", "weights").initial_seed() % 2**31)
        model = PairModel(std=0.1)
    data = seeded(config.seed, "icl-gd", "pairs", "data")
    steps, probes = config.steps(1500), linear_tasks(32, FAMILY, seeded(config.seed, "icl-gd", "pairs", "probes"))
    seen: list[dict[str, float]] = []

    def probe(step: int) -> None:
        directions = seeded(config.seed, "icl-gd", "pairs", "directions")
        own, following, rest = copied(model, probes, directions)
        seen.append({"step": step, "own": own, "next": following, "others": rest})

    def loss(step: int) -> Tensor:
        if step % max(1, steps // 20) == 0:
            probe(step)
        tasks = linear_tasks(512, FAMILY, data)
        return half_square(model(tasks), tasks.target_B)

    curve = fit(model, loss, steps=steps, rate=3e-3, tick=tick)
    probe(steps)
    tasks = test_tasks(config)
    step = torch.tensor([one_step_rate()], dtype=torch.float64)
    with torch.no_grad():
        measured = half_square(model(tasks), tasks.target_B).item()
    return {"curve": thinned(curve), "loss": measured, "gd": solver_loss(tasks, descend(step)), "probes": seen}
