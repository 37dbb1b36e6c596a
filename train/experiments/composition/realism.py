"""Whether composed pictures can be told from right answers, as sets: no picture is compared with its own answer."""

import numpy as np

from attnzoo.clinical.metrics import auroc

FOLDS = 5
RIDGE = 0.3
"""Of the linear classifier, in units of a standardised feature's variance."""
SUBSET, SUBSETS = 64, 200
"""Pictures of a subset, and how many subsets KID is averaged over."""


def classifier_two_sample(real_ND: np.ndarray, other_MD: np.ndarray, seed: int = 0) -> float:
    """Area under the ROC curve of a linear classifier that tells the two sets apart, on rows that it has not learned
    from (Lopez-Paz and Oquab 2017, arXiv 1610.06545; least squares with a ridge, five folds): 0.5 for equal sets."""
    x = np.concatenate([real_ND, other_MD])
    x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-6)
    label_N = np.repeat([0, 1], [len(real_ND), len(other_MD)])
    fold_N = np.random.default_rng(seed).permutation(len(x)) % FOLDS
    scores = np.zeros(len(x))
    for fold in range(FOLDS):
        learned, tested = x[fold_N != fold], x[fold_N == fold]
        aim = label_N[fold_N != fold] - 0.5
        products = learned.T @ learned + RIDGE * len(learned) * np.eye(x.shape[1])
        scores[fold_N == fold] = tested @ np.linalg.solve(products, learned.T @ aim)
    return float(auroc(label_N, scores))


def kernel_distance(real_ND: np.ndarray, other_MD: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """(mean, standard deviation over subsets) of the squared maximum mean discrepancy of features with the kernel
    (x.y / D + 1)^3, unbiased: near 0, of either sign, for equal sets (KID, arXiv 1801.01401)."""
    random, size = np.random.default_rng(seed), min(SUBSET, len(real_ND), len(other_MD))
    found = []
    for _ in range(SUBSETS):
        one, other = (x[random.permutation(len(x))[:size]] for x in (real_ND, other_MD))
        within = [(_kernel(x, x).sum() - np.trace(_kernel(x, x))) / (size * (size - 1)) for x in (one, other)]
        found.append(sum(within) - 2 * _kernel(one, other).mean())
    return float(np.mean(found)), float(np.std(found))


def _kernel(x_ND: np.ndarray, y_MD: np.ndarray) -> np.ndarray:
    return np.asarray((x_ND @ y_MD.T / x_ND.shape[1] + 1) ** 3)
