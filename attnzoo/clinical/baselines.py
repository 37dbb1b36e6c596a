"""Models that attention must be compared with, in the same folds: logistic regression and LightGBM of summary features,
and logistic regression of the words of texts.

The first two predict the probability of label 1 and are fitted on the rows that they are given, the standardisation
included. All come with `pip install 'attnzoo[clinical]'`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from attnzoo.clinical import checks

Predictor = Callable[[np.ndarray], np.ndarray]
"""From features [N, F] to probabilities [N]."""


@dataclass(frozen=True, kw_only=True)
class LightGbmConfig:
    """Boosted trees for a few thousand stays: many small steps, small trees, leaves of many stays."""

    learning_rate: float = 0.03
    trees: int = 300
    leaves: int = 31
    min_child: int = 40
    subsample: float = 0.9
    colsample: float = 0.9
    threads: int = 1


def fit_logistic_regression(features_NF: np.ndarray, labels: ArrayLike, *, strength: float = 0.01) -> Predictor:
    """Logistic regression with an L2 penalty on standardised features. What is missing becomes the training median;
    counts and missing shares among the features tell it apart. strength: the inverse of the penalty (C).

    Raises ValueError for labels that are not 0 and 1 and for an extra that is not installed.
    """
    labels_N = _checked(features_NF, labels)
    try:
        from sklearn.impute import SimpleImputer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        raise _missing("scikit-learn") from None
    model = make_pipeline(
        SimpleImputer(strategy="median", keep_empty_features=True),
        StandardScaler(),
        LogisticRegression(C=strength, max_iter=1000),
    )
    model.fit(features_NF.astype(np.float64), labels_N)
    return lambda given_NF: np.asarray(model.predict_proba(given_NF.astype(np.float64))[:, 1])


def fit_text_regression(
    texts: Sequence[str], classes: ArrayLike, number: int, *, ngrams: int = 1, strength: float = 10.0
) -> Callable[[Sequence[str]], np.ndarray]:
    """Multinomial logistic regression on tf-idf weights of words (and of sequences of up to `ngrams` words) that stand
    in two texts or more. classes: of each text, below `number`. Predicts probabilities [N, number]; 0 of a class that
    no text has. strength: the inverse of the penalty (C).

    Raises ValueError for classes that do not fit and for an extra that is not installed.
    """
    class_N = np.asarray(classes)
    if class_N.shape != (len(texts),) or not np.isin(class_N, range(number)).all():
        raise ValueError(f"classes of shape {class_N.shape} must hold a number below {number} for each text")
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
    except ImportError:
        raise _missing("scikit-learn") from None
    words = TfidfVectorizer(ngram_range=(1, ngrams), min_df=2, sublinear_tf=True)
    model = make_pipeline(words, LogisticRegression(C=strength, max_iter=1000))
    model.fit(list(texts), class_N)

    def predict(given: Sequence[str]) -> np.ndarray:
        found_NK = np.zeros((len(given), number))
        found_NK[:, model[-1].classes_] = model.predict_proba(list(given))
        return found_NK

    return predict


def fit_lightgbm(
    features_NF: np.ndarray, labels: ArrayLike, *, config: LightGbmConfig | None = None, seed: int = 0
) -> Predictor:
    """LightGBM, which keeps what is missing as missing. The same seed gives the same trees on any number of threads.

    Raises ValueError as `fit_logistic_regression` does.
    """
    labels_N, chosen = _checked(features_NF, labels), config or LightGbmConfig()
    try:
        import lightgbm
    except ImportError:
        raise _missing("lightgbm") from None
    model = lightgbm.train(
        {
            "objective": "binary",
            "learning_rate": chosen.learning_rate,
            "num_leaves": chosen.leaves,
            "min_data_in_leaf": chosen.min_child,
            "bagging_fraction": chosen.subsample,
            "bagging_freq": 1,
            "feature_fraction": chosen.colsample,
            "num_threads": chosen.threads,
            "seed": seed,
            "deterministic": True,
            "force_row_wise": True,
            "verbosity": -1,
        },
        lightgbm.Dataset(features_NF, labels_N),
        num_boost_round=chosen.trees,
    )
    return lambda given_NF: np.asarray(model.predict(given_NF, num_threads=chosen.threads))


def _checked(features_NF: np.ndarray, labels: ArrayLike) -> np.ndarray:
    labels_N, _ = checks.scores(labels, np.zeros(len(features_NF)))
    if np.isinf(features_NF).any():
        raise ValueError("features hold an infinite value; NaN stands for what is missing")
    return labels_N


def _missing(package: str) -> ValueError:
    return ValueError(f"the package {package} is not installed; run pip install 'attnzoo[clinical]'")
