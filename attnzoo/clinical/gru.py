"""A recurrent baseline that attention must be compared with, in the same folds: a GRU over the hours of a stay.

It reads the same cells and statics as attention (`Statistics.cells`), predicts the same outcomes with the same losses,
and is selected in the same way: the mean of the weights of the best epochs on the inner validation rows.

Letters: N stays, T hours, V variables, C channels, S statics, H hidden units.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from attnzoo.clinical.cohort import Cohort
from attnzoo.clinical.outcome import Outcome
from attnzoo.clinical.splits import Fold
from attnzoo.clinical.statistics import CHANNELS, Statistics
from attnzoo.clinical.trained import inputs
from attnzoo.report import counted
from attnzoo.types import CheckedConfig

WARMUP = 0.05
"""Share of the steps in which the learning rate rises; then it falls to 0 by a cosine."""
ROWS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class GruConfig(CheckedConfig):
    """hidden: units of each layer. dropout: of the inputs, between layers, and before the head. lr: the peak of a
    cosine. clipping: of the gradient norm. keep_best: the mean of the weights after so many best epochs is kept."""

    hidden: int = 64
    layers: int = 1
    dropout: float = 0.2
    lr: float = 3e-3
    weight_decay: float = 0.05
    clipping: float = 1.0
    epochs: int = 20
    batch_size: int = 64
    keep_best: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden", "layers", "epochs", "batch_size", "keep_best"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("lr", "clipping"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay={self.weight_decay} must be at least 0")


class GruNetwork(nn.Module):
    """Logits of a stay, or of each of its hours. The statics make the first state, and the head reads them again."""

    def __init__(self, config: GruConfig, outcome: Outcome, variables: int, statics: int) -> None:
        super().__init__()
        self.outcome, self.layers = outcome, config.layers
        self.dropout = nn.Dropout(config.dropout)
        self.first = nn.Linear(statics, config.layers * config.hidden)
        between = config.dropout if config.layers > 1 else 0.0
        width = variables * len(CHANNELS)
        self.gru = nn.GRU(width, config.hidden, config.layers, batch_first=True, dropout=between)
        self.head = nn.Linear(config.hidden + statics, 1 if outcome.ordinal else outcome.outputs)
        self.steps = nn.Parameter(torch.zeros(outcome.outputs)) if outcome.ordinal else None

    def forward(self, cells_NTVC: Tensor, statics_NS: Tensor, hours_N: Tensor) -> Tensor:
        """Logits [N, outputs], or [N, T, outputs] where they are hourly: those of hours that do not exist are finite
        and mean nothing. An hour sees none after it; a stay without hours has the state of its statics."""
        stays, hours = cells_NTVC.shape[:2]
        first_LNH = self.first(statics_NS).tanh().view(stays, self.layers, -1).transpose(0, 1).contiguous()
        packed = pack_padded_sequence(
            self.dropout(cells_NTVC.flatten(2)), hours_N.cpu().clamp(min=1), batch_first=True, enforce_sorted=False
        )
        states, last_LNH = self.gru(packed, first_LNH)
        if self.outcome.hourly:
            state_NTH, _ = pad_packed_sequence(states, batch_first=True, total_length=hours)
            return self._logits(state_NTH, statics_NS[:, None].expand(-1, hours, -1))
        return self._logits(torch.where((hours_N > 0)[:, None], last_LNH[-1], first_LNH[-1]), statics_NS)

    def _logits(self, state: Tensor, statics: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.cat([self.dropout(state), statics], dim=-1))
        if self.steps is not None:  # thresholds that rise, so that P(bucket > k) falls
            logits = logits - torch.cat([self.steps[:1], nn.functional.softplus(self.steps[1:])]).cumsum(0)
        return logits


@dataclass(frozen=True)
class Gru:
    """A fitted GRU with what its predictions depend on. scores: by epoch, on the inner validation rows."""

    network: GruNetwork
    statistics: Statistics
    outcome: Outcome
    scores: list[float]

    @torch.no_grad()
    def logits(self, cohort: Cohort, rows: np.ndarray | None = None) -> np.ndarray:
        """[N, outputs] or [N, T, outputs], float32."""
        rows = np.arange(len(cohort)) if rows is None else np.asarray(rows)
        starts = range(0, len(rows), ROWS_AT_ONCE)
        parts = [self.network(*inputs(self.statistics, cohort, rows[i : i + ROWS_AT_ONCE])) for i in starts]
        return torch.cat(parts).numpy()

    def predict(self, cohort: Cohort, rows: np.ndarray | None = None) -> np.ndarray:
        """Probabilities, as `Outcome.probabilities`."""
        return self.outcome.probabilities(self.logits(cohort, rows))


def fit_gru(
    cohort: Cohort,
    outcome: Outcome,
    fold: Fold,
    config: GruConfig | None = None,
    *,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> Gru:
    """Learns from the training rows, standardised by their statistics alone, and selects on the validation rows; the
    test rows are not looked at. Rows without a label are left out. The same seed and number of threads give the same
    weights. tick: called after every epoch.

    Raises ValueError for a part without labels (of yes or no: of both kinds), and if no epoch could be scored.
    """
    config = config or GruConfig()
    labels = torch.from_numpy(outcome.labels(cohort))
    known_N = ~torch.isnan(labels.flatten(1) if labels.dim() > 1 else labels[:, None]).all(dim=1).numpy()
    parts = {name: getattr(fold, name)[known_N[getattr(fold, name)]] for name in ("train", "validation")}
    for name, rows in parts.items():
        found = labels[rows][~torch.isnan(labels[rows])]
        if not len(found) or (not outcome.edges and found.min() == found.max()):
            kinds = "" if outcome.edges else " of both kinds"
            raise ValueError(
                f"the {name} part of {counted(len(rows), 'stay')} has no {outcome.label!r}{kinds}; give more stays"
            )
    statistics, outcome = Statistics.fit(cohort, parts["train"]), outcome.fitted(labels[parts["train"]].numpy())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = GruNetwork(config, outcome, len(cohort.grid.variables), len(statistics.static_columns))
        model = Gru(network, statistics, outcome, [])
        _train(model, cohort, labels, parts, config, np.random.default_rng(seed), tick)
    return model


def _train(
    model: Gru,
    cohort: Cohort,
    labels: Tensor,
    parts: dict[str, np.ndarray],
    config: GruConfig,
    random: np.random.Generator,
    tick: Callable[[], None],
) -> None:
    """Trains the network, and gives it the mean of the best epochs' weights."""
    network, outcome = model.network, model.outcome
    decayed = [weight for weight in network.parameters() if weight.dim() > 1]
    others = [weight for weight in network.parameters() if weight.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)
    steps = config.epochs * math.ceil(len(parts["train"]) / config.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / steps))
    best: list[tuple[float, dict[str, Tensor]]] = []
    for _ in range(config.epochs):
        network.train()
        rows = random.permutation(parts["train"])
        for start in range(0, len(rows), config.batch_size):
            some = rows[start : start + config.batch_size]
            label = labels[some]
            loss = outcome.loss_sum(network(*inputs(model.statistics, cohort, some)), label)
            optimizer.zero_grad(set_to_none=True)
            (loss / (~torch.isnan(label)).sum()).backward()
            nn.utils.clip_grad_norm_(network.parameters(), config.clipping)
            optimizer.step()
            schedule.step()
        network.eval()
        found = outcome.metrics(
            labels[parts["validation"]], torch.from_numpy(model.logits(cohort, parts["validation"]))
        )
        model.scores.append(outcome.score(found))
        if math.isfinite(model.scores[-1]):
            best.append((model.scores[-1], {name: each.clone() for name, each in network.state_dict().items()}))
            best = sorted(best, key=lambda each: -each[0])[: config.keep_best]
        tick()
    if not best:
        stays = len(parts["validation"])
        raise ValueError(
            f"no epoch could be scored on {counted(stays, 'validation stay')}; lower lr={config.lr}, or give more stays"
        )
    network.load_state_dict({name: torch.stack([each[name] for _, each in best]).mean(0) for name in best[0][1]})


def _rate(done: float) -> float:
    """The factor of the peak learning rate after this share of the steps."""
    if done < WARMUP:
        return (done + 1e-3) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (done - WARMUP) / (1 - WARMUP)))
