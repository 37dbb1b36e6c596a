"""What is predicted of a stay: a label of the cohort, as a yes or no, or as one of several buckets of a length of time.

Letters: N stays, T hours, B buckets. Labels are [N], or [N, T] for what is predicted each hour; NaN: there is none.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.clinical.agreement import weighted_kappa
from attnzoo.clinical.cohort import Cohort
from attnzoo.clinical.metrics import auprc, auroc, brier, mean_absolute_deviation, score_1
from attnzoo.types import CheckedConfig, build_config


@dataclass(frozen=True, kw_only=True)
class Outcome(CheckedConfig):
    """label: of the cohort. edges: where buckets of the label end, ascending, in its unit; none: the label is 0 or 1.
    head: "ordinal" for buckets told by the probabilities of exceeding each edge, "linear" for a probability of each.
    hourly: whether there is a label for every hour. centers: a typical label of each bucket, of training rows.
    """

    label: str = "mortality"
    edges: tuple[float, ...] = ()
    head: Literal["linear", "ordinal"] = "ordinal"
    hourly: bool = False
    centers: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if list(self.edges) != sorted(set(self.edges)):
            raise ValueError(f"edges={list(self.edges)} must ascend; a label of 0 or 1 takes none")
        if self.centers and len(self.centers) != len(self.edges) + 1:
            raise ValueError(f"centers has {len(self.centers)} values for {len(self.edges) + 1} buckets")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Outcome":
        """Reads what `to_dict` wrote. Raises ValueError for unknown keys."""
        return build_config(cls, values, "outcome")

    def to_dict(self) -> dict[str, Any]:
        """A mapping that JSON can hold."""
        return asdict(self)

    @property
    def ordinal(self) -> bool:
        """Whether the logits are those of exceeding each edge."""
        return bool(self.edges) and self.head == "ordinal"

    @property
    def outputs(self) -> int:
        """Number of logits: of a stay, or of each of its hours."""
        return len(self.edges) + (0 if self.ordinal else 1)

    def labels(self, cohort: Cohort, rows: np.ndarray | None = None) -> np.ndarray:
        """Labels as float32 [N] or [N, T], NaN in hours that do not exist. Raises ValueError that names the label for
        one that the cohort lacks or that is of another kind."""
        found = np.asarray(cohort.label(self.label), np.float32)
        if found.ndim != (2 if self.hourly else 1):
            kind = "one for each hour" if found.ndim == 2 else "one for each stay"
            raise ValueError(f"label {self.label!r} of cohort {cohort.name!r} is {kind}; set hourly={not self.hourly}")
        known = found[~np.isnan(found)]
        if not self.edges and not np.isin(known, (0, 1)).all():
            raise ValueError(
                f"label {self.label!r} of cohort {cohort.name!r} has values such as "
                f"{known[~np.isin(known, (0, 1))][0]:g}, not only 0 and 1; give the edges of its buckets"
            )
        if self.hourly:
            gone_NT = np.arange(found.shape[1]) >= cohort.grid.hours_N[:, None]
            found = np.where(gone_NT, np.float32(np.nan), found)
        return found if rows is None else found[rows]

    def kinds(self, labels: np.ndarray) -> np.ndarray:
        """0 or 1, or the bucket, of each label; NaN where there is none. Shape of labels."""
        if not self.edges:
            return labels
        buckets = np.searchsorted(self.edges, labels, side="right").astype(np.float32)
        return np.where(np.isnan(labels), np.float32(np.nan), buckets)

    def fitted(self, labels: np.ndarray) -> "Outcome":
        """With the median label of each bucket as its center; for an empty one the edge beside it."""
        if not self.edges:
            return self
        known = labels[~np.isnan(labels)]
        buckets = np.searchsorted(self.edges, known, side="right")
        near = (*self.edges, self.edges[-1])
        centers = tuple(
            float(np.median(known[buckets == bucket])) if (buckets == bucket).any() else float(edge)
            for bucket, edge in enumerate(near)
        )
        return replace(self, centers=centers)

    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The sum over all labels that are known: binary cross entropy (for ordinal buckets its mean over the edges),
        or cross entropy of the buckets. logits: [N, outputs] or [N, T, outputs]; labels: [N] or [N, T]."""
        known = ~torch.isnan(labels)
        logits_KO, label_K = logits[known].float(), labels[known].float()
        if not self.edges:
            return F.binary_cross_entropy_with_logits(logits_KO[:, 0], label_K, reduction="sum")
        edges = torch.tensor(self.edges, device=labels.device)
        bucket_K = torch.bucketize(label_K, edges, right=True)
        if not self.ordinal:
            return F.cross_entropy(logits_KO, bucket_K, reduction="sum")
        above_KO = (bucket_K[:, None] > torch.arange(len(edges), device=labels.device)).float()
        return F.binary_cross_entropy_with_logits(logits_KO, above_KO, reduction="sum") / len(edges)

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Of a label of 1: [N] or [N, T]; of each bucket: [N, B] or [N, T, B]. float64."""
        given = torch.from_numpy(np.asarray(logits, np.float64))
        if not self.edges:
            return given[..., 0].sigmoid().numpy()
        if not self.ordinal:
            return given.softmax(-1).numpy()
        above = given.sigmoid()
        ends = [torch.ones_like(above[..., :1]), torch.zeros_like(above[..., :1])]
        return (torch.cat([ends[0], above], -1) - torch.cat([above, ends[1]], -1)).numpy()

    def buckets(self, logits: np.ndarray) -> np.ndarray:
        """The median bucket: the first that is not exceeded with a probability above one half."""
        reached = np.cumsum(self.probabilities(logits), axis=-1)[..., :-1]
        return (reached < 0.5).sum(axis=-1)

    def told(self, logits: np.ndarray) -> np.ndarray:
        """The typical label of the median bucket, in the label's unit."""
        return np.array(self.centers)[self.buckets(logits)]

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Keys of `metrics`."""
        return ("loss", *(("kappa", "mad") if self.edges else ("auroc", "auprc", "score_1", "brier")))

    def metrics(self, labels: Tensor, logits: Tensor) -> dict[str, float]:
        """By name: the loss, and of yes or no AUROC, AUPRC, Score 1 and Brier; of buckets the linear kappa, and the
        mean absolute deviation of `told`. Over all labels that are known, so that each hour counts alike; NaN where a
        logit is not finite. Shapes as in `loss_sum`."""
        if not bool(torch.isfinite(logits).all()):
            return dict.fromkeys(self.metric_names, float("nan"))
        known = ~torch.isnan(labels)
        found = {"loss": float(self.loss_sum(logits, labels)) / int(known.sum())}
        label_K, logits_KO = labels[known].numpy(), logits[known].numpy()
        if not self.edges:
            probability_K = self.probabilities(logits_KO)
            kinds = {"auroc": auroc, "auprc": auprc, "score_1": score_1, "brier": brier}
            return found | {name: metric(label_K, probability_K) for name, metric in kinds.items()}
        kappa = weighted_kappa(range(len(self.edges) + 1), "linear")
        bucket_K = np.searchsorted(self.edges, label_K, side="right")
        return found | {
            "kappa": kappa(bucket_K, self.buckets(logits_KO)),
            "mad": mean_absolute_deviation(label_K, self.told(logits_KO)),
        }

    def counts(self, labels: np.ndarray) -> dict[str, Any]:
        """How many labels are known, and how many are 1 ("events") or in each bucket ("buckets")."""
        known = labels[~np.isnan(labels)]
        if not self.edges:
            return {"labels": len(known), "events": int(known.sum())}
        buckets = np.searchsorted(self.edges, known, side="right")
        return {"labels": len(known), "buckets": np.bincount(buckets, minlength=len(self.edges) + 1).tolist()}

    def score(self, metrics: dict[str, float]) -> float:
        """What selects: AUPRC + AUROC, or kappa."""
        return metrics["kappa"] if self.edges else metrics["auprc"] + metrics["auroc"]
