"""Closed forms for one gradient descent step on in-context linear regression: best rate, least loss, preconditioner.

One step from w = 0 on half the squared error predicts a sum_j y_j x_j . x_q = a x_q^T X^T y.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Optimum:
    """The best learning rate of one step, and the loss after it."""

    rate: float
    loss: float


def even_moments(inputs: str, scale: float = 1.0) -> tuple[float, float]:
    """(E x^2, E x^4) of an entry: "uniform" on (-scale, scale), or "normal" of standard deviation `scale`.

    Raises ValueError for another law.
    """
    if inputs == "uniform":
        return scale**2 / 3, scale**4 / 5
    if inputs == "normal":
        return scale**2, 3 * scale**4
    raise ValueError(f"inputs={inputs!r}: moments are known for 'uniform' and 'normal'")


def least_squares_step(dim: int, examples: int, second: float, fourth: float) -> Optimum:
    """Best a for w ~ N(0, I), independent even entries of x with moments E x^2 = s, E x^4 = m, no noise; the loss is
    half the squared error.

    With S = X^T X the error is x_q . (I - a S) w, so twice the loss is s E tr (I - a S)^2 = s (d - 2 a E tr S +
    a^2 E tr S^2). E tr S = N d s. In tr S^2 = sum_jk (x_j . x_k)^2 the N terms j = k are E |x|^4 = d m + d (d-1) s^2
    and the N (N-1) others d s^2, together N d (m + (d+N-2) s^2). The parabola is least at a* = s / (m + (d+N-2) s^2),
    where it is .5 s d (1 - a* N s). Own derivation; rates and losses of arXiv 2212.07677 agree.
    """
    rate = second / (fourth + (dim + examples - 2) * second**2)
    return Optimum(rate, 0.5 * second * dim * (1 - rate * examples * second))


def gaussian_step(dim: int, examples: int, noise: float) -> Optimum:
    """Best eta for x ~ N(0, Sigma), w ~ N(0, Sigma^-1), noise variance v, of the step eta x_q^T Sigma^-1 X^T y, and its
    mean squared error (not halved), the noise on the query's target included (arXiv 2307.03576, theorems 1 and 2).

    In coordinates Sigma^-1/2 x and Sigma^1/2 w everything is standard normal. E y_q yhat = eta n d and E yhat^2 =
    eta^2 (n E |x|^2 y^2 + n (n-1) d) with E |x|^2 y^2 = d (d+2) + d v; the parabola E y^2 - 2 eta n d + eta^2 n d
    (n+d+1+v) is least at 1 / (n+d+1+v), where it is d + v - n d eta* = v + d (d+1+v) / (n+d+1+v).
    """
    rate = 1 / (examples + dim + 1 + noise)
    return Optimum(rate, noise + dim * (dim + 1 + noise) * rate)


def mixed_preconditioner(variances_D: Tensor, examples: int, noise: float) -> tuple[Tensor, float]:
    """(Gamma_DD, loss) of the best step x_q^T Gamma X^T y for x ~ N(0, Sigma), w ~ N(0, I), noise variance v
    (Ahn et al. 2023, arXiv 2306.00297, theorem 1; loss as in `gaussian_step`). Float64.

    The error is quadratic in Gamma: with G = E (X^T y)(X^T y)^T = n [(n+1) Sigma^2 + (tr Sigma + v) Sigma] (for one
    pair E x x^T (x.w)^2 = 2 Sigma^2 + tr(Sigma) Sigma by Isserlis, averaged over w; two pairs give Sigma^2) and E w
    (X^T y)^T = n Sigma, it is tr Sigma + v - 2 n tr Sigma Gamma Sigma + tr Sigma Gamma G Gamma. Setting the gradient
    to zero gives Gamma G = n Sigma, Gamma = [(n+1) Sigma + (tr Sigma + v) I]^-1.
    """
    variances_D = variances_D.double()
    diagonal_D = 1 / ((examples + 1) * variances_D + variances_D.sum() + noise)
    loss = variances_D.sum() + noise - examples * (variances_D**2 * diagonal_D).sum()
    return torch.diag(diagonal_D), loss.item()


def odd_function_step(dim: int, examples: int, noise: float) -> Optimum:
    """`gaussian_step` for y = sign * relu(w . x) + noise with a random sign a task, w, x ~ N(0, I).

    For any f rotation-invariant in law, with u = E_x f(x) x: E y_q yhat = eta n |u|^2 and E yhat^2 = eta^2 (n E y^2
    |x|^2 + n (n-1) |u|^2), so eta* = E |u|^2 / (E y^2 |x|^2 + (n-1) E |u|^2) and the loss is E y^2 - eta* n E |u|^2
    (arXiv 2307.03576, theorem 3). Here u = +-w / 2, E |u|^2 = d / 4, E y^2 = d / 2 + v and E y^2 |x|^2 = d (d+2) / 2
    + v d, so eta* = 1 / (2 (d+2) + 4 v + n - 1). An even f has u = 0, and the best step is none.
    """
    rate = 1 / (2 * (dim + 2) + 4 * noise + examples - 1)
    return Optimum(rate, dim / 2 + noise - rate * examples * dim / 4)
