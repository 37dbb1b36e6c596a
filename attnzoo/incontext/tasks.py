"""Random regression tasks, each drawn from a generator seeded with a key, never from torch's global one."""

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Inputs = Literal["uniform", "normal", "laplace", "exponential", "binary", "sparse"]


def seeded(seed: int, *key: object) -> torch.Generator:
    """A random generator for one purpose: equal (seed, key) give equal numbers, whatever else runs."""
    text = "/".join(map(str, (seed, *key)))
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@dataclass(frozen=True)
class Tasks:
    """x_BTD, y_BT: examples in context; query_BD, target_B: the query, and its answer."""

    x_BTD: Tensor
    y_BT: Tensor
    query_BD: Tensor
    target_B: Tensor

    def tokens(self) -> Tensor:
        """e_BTE of shape [B, T + 1, D + 1]: (x_j, y_j), and the query (x_q, 0) last (arXiv 2212.07677, section 2)."""
        asked_B1E = torch.cat([self.query_BD, torch.zeros_like(self.target_B)[:, None]], dim=1)[:, None]
        return torch.cat([torch.cat([self.x_BTD, self.y_BT[..., None]], dim=2), asked_B1E], dim=1)

    def gram(self) -> Tensor:
        """C^T C of the examples' tokens, [B, D + 1, D + 1]: all that linear attention reads of a context."""
        c_BTE = self.tokens()[:, :-1]
        return c_BTE.mT @ c_BTE

    def double(self) -> "Tasks":
        """In float64."""
        return Tasks(self.x_BTD.double(), self.y_BT.double(), self.query_BD.double(), self.target_B.double())


@dataclass(frozen=True, kw_only=True)
class LinearFamily:
    """y = w . x + noise. inputs: law of an input's entries at scale `radius` (uniform: U(-radius, radius); the others
    have the standard deviation radius / sqrt(3) of that one); covariance: variances of the D entries (normal inputs
    only, radius is then not used); weights: standard deviation of w's entries, or "inverse": covariance Sigma^-1;
    noise: variance of the noise on y, the query's target included."""

    dim: int = 10
    examples: int = 10
    inputs: Inputs = "uniform"
    radius: float = 1.0
    covariance: tuple[float, ...] | None = None
    weights: float | Literal["inverse"] = 1.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.covariance is not None and len(self.covariance) != self.dim:
            raise ValueError(f"covariance={self.covariance} has {len(self.covariance)} variances for dim={self.dim}")
        if self.covariance is not None and self.inputs != "normal":
            raise ValueError(f"covariance is for inputs='normal', not inputs={self.inputs!r}")
        if self.weights == "inverse" and self.covariance is None:
            raise ValueError("weights='inverse' needs a covariance")
        if min(self.dim, self.examples) < 1 or self.radius <= 0 or self.noise < 0:
            raise ValueError(
                f"dim={self.dim}, examples={self.examples} and radius={self.radius} must be positive, "
                f"noise={self.noise} at least 0"
            )

    def variances(self) -> Tensor:
        """Variance of each entry of x, float64 [D]."""
        if self.covariance is not None:
            return torch.tensor(self.covariance, dtype=torch.float64)
        return torch.full((self.dim,), self.radius**2 / 3, dtype=torch.float64)


def linear_tasks(batch: int, family: LinearFamily, generator: torch.Generator) -> Tasks:
    """`batch` tasks y = w . x + noise of the family, float32."""
    x_BTD = _inputs((batch, family.examples + 1, family.dim), family, generator)
    w_BD = torch.randn(batch, family.dim, generator=generator)
    if family.weights == "inverse":
        w_BD = w_BD / family.variances().sqrt().float()
    else:
        w_BD = w_BD * family.weights
    y_BT = (x_BTD @ w_BD[..., None])[..., 0]
    if family.noise:
        y_BT = y_BT + math.sqrt(family.noise) * torch.randn(y_BT.shape, generator=generator)
    return Tasks(x_BTD[:, :-1], y_BT[:, :-1], x_BTD[:, -1], y_BT[:, -1])


def _inputs(shape: tuple[int, ...], family: LinearFamily, generator: torch.Generator) -> Tensor:
    if family.covariance is not None:
        return torch.randn(shape, generator=generator) * family.variances().sqrt().float()
    uniform = torch.rand(shape, generator=generator) * 2 - 1
    if family.inputs == "uniform":
        return uniform * family.radius
    signs = uniform.sign()
    if family.inputs == "normal":
        unit = torch.randn(shape, generator=generator)
    elif family.inputs == "binary":
        unit = signs
    elif family.inputs == "sparse":  # one entry in four is there
        unit = 2 * signs * (torch.rand(shape, generator=generator) < 0.25)
    else:
        magnitude = -torch.log1p(-torch.rand(shape, generator=generator))
        # Laplace has variance 2; an exponential variable less its mean has variance 1.
        unit = signs * magnitude / math.sqrt(2) if family.inputs == "laplace" else magnitude - 1
    return unit * family.radius / math.sqrt(3)


def sine_tasks(batch: int, examples: int, generator: torch.Generator) -> Tasks:
    """y = amplitude sin(x + phase): x ~ U(-5, 5), amplitude ~ U(.1, .5), phase ~ U(0, pi) (arXiv 2212.07677, sec.
    4)."""
    x_BT1 = torch.rand(batch, examples + 1, 1, generator=generator) * 10 - 5
    amplitude_B1 = 0.1 + 0.4 * torch.rand(batch, 1, generator=generator)
    phase_B1 = math.pi * torch.rand(batch, 1, generator=generator)
    y_BT = amplitude_B1 * torch.sin(x_BT1[..., 0] + phase_B1)
    return Tasks(x_BT1[:, :-1], y_BT[:, :-1], x_BT1[:, -1], y_BT[:, -1])


def ridge(tasks: Tasks, penalty: float | Tensor) -> Tensor:
    """Predictions x_q . (X^T X + Lambda)^-1 X^T y. `penalty`: a number, or the diagonal of Lambda, [D].

    The Bayes predictor for noise variance v and w ~ N(0, diag(c)) at Lambda = v / c; least squares as it goes to 0.
    """
    diagonal_D = torch.as_tensor(penalty, dtype=tasks.x_BTD.dtype).expand(tasks.x_BTD.shape[-1])
    s_BDD = tasks.x_BTD.mT @ tasks.x_BTD + torch.diag(diagonal_D)
    w_BD1 = torch.linalg.solve(s_BDD, tasks.x_BTD.mT @ tasks.y_BT[..., None])
    return (tasks.query_BD[:, None] @ w_BD1)[:, 0, 0]
