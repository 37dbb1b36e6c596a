"""Softmax regression: fit f(x) = exp(A x) / <exp(A x), 1> to a distribution b by x (arXiv 2304.13276).

Letters: T rows of A (n in the paper), D columns (d). L(x) = .5 |f(x) - b|^2, c = f - b, J = diag(f) - f f^T.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def softmax_model(a_TD: Tensor, x_D: Tensor) -> Tensor:
    """f(x) [T]; leading batch axes are allowed in both."""
    return torch.softmax((a_TD @ x_D[..., None])[..., 0], dim=-1)


def softmax_loss(a_TD: Tensor, x_D: Tensor, b_T: Tensor) -> Tensor:
    """L(x) = .5 |f(x) - b|^2."""
    return 0.5 * (softmax_model(a_TD, x_D) - b_T).square().sum(-1)


def softmax_gradient(a_TD: Tensor, x_D: Tensor, b_T: Tensor) -> Tensor:
    """dL/dx = A^T J c [D].

    With u = A x, df_i/du_k = f_i (1[i=k] - f_k), that is df = J du; so dL = c . df = c . J A dx, and J is symmetric.
    """
    f_T = softmax_model(a_TD, x_D)
    c_T = f_T - b_T
    return (a_TD.mT @ (f_T * (c_T - (f_T * c_T).sum(-1, keepdim=True)))[..., None])[..., 0]


def softmax_hessian(a_TD: Tensor, x_D: Tensor, b_T: Tensor) -> Tensor:
    """d^2L/dx^2 = A^T [J^2 + diag(c*f - <f,c> f) - (c*f) f^T - f (c*f)^T + 2 <f,c> f f^T] A, [D, D].

    J c = c*f - <f,c> f. Moving f by df = J du with c = f - b moves it by J dc = J^2 du, and with c held by
    c*df - <df,c> f - <f,c> df = [diag(c) J - f (J c)^T - <f,c> J] du; written out, the three are
    diag(c*f) - (c*f) f^T, then -f (c*f)^T + <f,c> f f^T, then -<f,c> diag(f) + <f,c> f f^T.
    """
    f_T = softmax_model(a_TD, x_D)
    c_T = f_T - b_T
    cf_T, fc = c_T * f_T, (f_T * c_T).sum(-1)
    j_TT = torch.diag(f_T) - torch.outer(f_T, f_T)
    inner_TT = j_TT @ j_TT + torch.diag(cf_T - fc * f_T) - torch.outer(cf_T, f_T) - torch.outer(f_T, cf_T)
    return a_TD.mT @ (inner_TT + 2 * fc * torch.outer(f_T, f_T)) @ a_TD


def shifted_target(b_T: Tensor, before_T: Tensor, after_T: Tensor) -> Tensor:
    """b~ = b - (f_after - f_before): |f_after - b| = |f_before - b~| by construction (theorem 1.2's weight
    shifting)."""
    return b_T - (after_T - before_T)


@dataclass(frozen=True)
class ShiftBound:
    """Constants C of |b~ - b| <= C |x' - x|, and of |b~ - b| <= C |A' - A|, for |A|, |x|, |x'| <= R (operator
    norms)."""

    paper: float
    tight: float


def shift_bounds(rows: int, radius: float) -> ShiftBound:
    """The paper's M = n^1.5 exp(10 R^2), and R / 2.

    |b~ - b| = |f' - f| is at most the largest |J| on the way times the way of u = A x. |J| <= 1/2: v . J v is the
    variance of v under f, at most ((max v - min v) / 2)^2 <= |v|^2 / 2. And |A x' - A x| <= R |x' - x|, |A' x - A x|
    <= R |A' - A|. Since |f' - f| <= sqrt(2) whatever happens, a constant C says nothing once C |x' - x| exceeds that.
    """
    return ShiftBound(rows**1.5 * math.exp(10 * radius**2), radius / 2)


@dataclass(frozen=True)
class SoftmaxTasks:
    """a_BTD; targets y_BT = n exp(a . x) / sum_j exp(a_j . x); the query a_BD and its target by the same sum."""

    a_BTD: Tensor
    y_BT: Tensor
    query_BD: Tensor
    target_B: Tensor

    def tokens(self) -> Tensor:
        """[B, T + 1, D + 1]: (a_j, y_j - 1), and the query (a_q, 0). Targets are centred to sum 0, because a softmax
        over the tokens averages them."""
        asked_B1E = torch.cat([self.query_BD, torch.zeros_like(self.target_B)[:, None]], dim=1)[:, None]
        return torch.cat([torch.cat([self.a_BTD, self.y_BT[..., None] - 1], dim=2), asked_B1E], dim=1)


def softmax_tasks(batch: int, rows: int, dim: int, spread: float, generator: torch.Generator) -> SoftmaxTasks:
    """A ~ N(0, 1/d), x ~ N(0, spread^2 I)."""
    a_BTD = torch.randn(batch, rows + 1, dim, generator=generator) / math.sqrt(dim)
    x_BD = spread * torch.randn(batch, dim, generator=generator)
    raw_BT = (a_BTD @ x_BD[..., None])[..., 0].exp()
    y_BT = rows * raw_BT / raw_BT[:, :-1].sum(dim=1, keepdim=True)
    return SoftmaxTasks(a_BTD[:, :-1], y_BT[:, :-1], a_BTD[:, -1], y_BT[:, -1])


def softmax_step(tasks: SoftmaxTasks, rate: float | Tensor) -> Tensor:
    """Predictions [B] after one step of gradient descent from x = 0.

    There f = 1/n and the gradient is -A^T (n b - 1) / n^2, as n b - 1 adds up to 0: x = rate A^T (n b - 1) (the n^2
    is part of the rate), and the prediction is n exp(a_q . x) / sum_j exp(a_j . x).
    """
    x_BD1 = rate * tasks.a_BTD.mT @ (tasks.y_BT - 1)[..., None]
    total_B = (tasks.a_BTD @ x_BD1)[..., 0].exp().mean(dim=1)
    return (tasks.query_BD[:, None] @ x_BD1)[:, 0, 0].exp() / total_B


def linearised_step(tasks: SoftmaxTasks, rate: float | Tensor) -> Tensor:
    """The same step to first order: 1 + (a_q - mean a) . x, since n exp(u_q) / sum_j exp(u_j) = 1 + u_q - mean u +
    ..."""
    x_BD1 = rate * tasks.a_BTD.mT @ (tasks.y_BT - 1)[..., None]
    return 1 + ((tasks.query_BD - tasks.a_BTD.mean(dim=1))[:, None] @ x_BD1)[:, 0, 0]


def softmax_head(tasks: SoftmaxTasks, rate: float | Tensor, sharpness: float | Tensor) -> Tensor:
    """The constructed head: 1 + rate / sharpness sum_j softmax_j(sharpness a_j . a_q) (y_j - 1), which for small
    sharpness is 1 + rate / n sum_j (y_j - 1) a_j . a_q: `linearised_step` without mean a, which no head can subtract
    from a_q."""
    weights_BT = torch.softmax(sharpness * (tasks.a_BTD @ tasks.query_BD[..., None])[..., 0], dim=1)
    return 1 + rate / sharpness * (weights_BT * (tasks.y_BT - 1)).sum(1)
