"""TSCAN, an encoder of a stay in intensive care: two branches of attention along hours and along variables.

Source: "Temporal-spatial Correlation Attention Network for Clinical Data Analysis in Intensive Care Unit" (2023, arXiv
2306.01970). A stay is cut along time into chunks X_0, X_1, ...; in each branch (tokens: hours, or variables)

    z_0 = FFN(MSA(X_0 + PE)),   Q = MSA(X_j + PE),   K = z_{j-1},   z_j = FFN(MCA(Q, K, V))

with V of `attnzoo/attention/tscan.py`, residual sums and norms. The last z of both branches are pooled, put side by
side, and mapped to logits.

Differs from the paper: cells are embedded with whether and how often they were measured, not as raw rows; the statics
are a token of every chunk; a head on summary features has a say in the logits (`summary="none"` leaves it out), and
with `combine="mean"` it and each branch learn apart; hours and variables that do not exist are masked. Where every
hour has a prediction (`hourly`), an hour sees none after it: hours of its chunk up to it, what the chunks before have
become, and of the spatial branch the chunks before alone.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention import Attention
from attnzoo.attention.edits import EditRun, EditRuns, Edits, Map, TokenLayout, layer_sizes
from attnzoo.kvcache.state import new_zeros
from attnzoo.models.ehr_blocks import Branch, hinged
from attnzoo.models.ehr_cells import CHANNELS, GAP, SUMMARY, Summary, hide_cells, summarise
from attnzoo.models.ehr_config import EhrConfig
from attnzoo.models.ehr_state import EhrMaps, EhrState, StayBatch

LayerEdits = Mapping[str, EditRuns]
"""What is read and changed of attention layers, by their names in `EhrEncoder.attentions`."""


class EhrEncoder(nn.Module):
    """Logits of a stay, or of each of its hours, from its cells.

    forward(cells_NTVC, statics_NS, hours_N): cells have four channels, the standardised value (0 where nothing was
    measured), whether it was measured, log(1 + measurements in the hour) and the time since the last measurement
    (`attnzoo.models.ehr_cells`). hours_N: how many hours of each stay exist; what stands after them does not matter.
    """

    def __init__(self, config: EhrConfig) -> None:
        super().__init__()
        self.config = config
        names = ("temporal", "spatial") if config.branches == "both" else (config.branches,)
        self.branches = nn.ModuleDict({name: Branch(config, name == "temporal") for name in names})
        scores = 1 if config.head == "ordinal" else config.outputs
        self.dropout = nn.Dropout(config.dropout)
        self.head: nn.Linear | nn.ModuleDict = nn.Linear(config.width, scores)
        if config.combine == "mean":
            self.head = nn.ModuleDict({name: nn.Linear(config.width // len(names), scores) for name in names})
        features = config.variables * len(SUMMARY) + config.statics
        self.summary: nn.Module | None = None
        if config.summary == "linear":
            self.summary = nn.Linear(features, scores)
        elif config.summary == "mlp":
            maps = (nn.Linear(features, 64), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(64, scores))
            self.summary = nn.Sequential(*maps)
        if config.head == "ordinal":
            self.steps = nn.Parameter(torch.zeros(config.outputs))

    def forward(
        self,
        cells_NTVC: Tensor,
        statics_NS: Tensor,
        hours_N: Tensor,
        *,
        variables_NV: Tensor | None = None,
        edits: LayerEdits | None = None,
        each_part: bool = False,
    ) -> Tensor:
        """Logits [N, outputs], or [N, T, outputs] where they are hourly: those of hours that do not exist are finite
        and mean nothing. variables_NV (bool): which variables exist in the source of a stay, None: all. edits: what is
        read and changed of attention. each_part: logits [P, N, ...] of the parts that have a loss of their own: with
        combine="mean" the branches and then the summary head, else one part. Raises ValueError for shapes that do not
        fit the configuration, and for stays that are longer than its chunks."""
        tokens = cells_NTVC.shape[1]
        if self.training:
            cells_NTVC = self._with_cells_hidden(cells_NTVC)
        stays = self._stays(cells_NTVC, statics_NS, hours_N, variables_NV)
        features = None if self.summary is None else self._features(stays)
        found = {name: self._run(name, stays, edits) for name in self.branches}
        if not self.config.hourly:
            fused = [self._branch(name).pooled(zs[-1], self._last_exist(name, stays)) for name, zs in found.items()]
            return self._logits(fused, features, stays.statics_NS, each_part)
        fused = [self._each_hour(name, zs, stays) for name, zs in found.items()]
        logits = self._logits(fused, features, stays.statics_NS[:, None], each_part)
        return F.pad(logits, (0, 0, 0, max(tokens - logits.shape[-2], 0)))[..., :tokens, :]

    def encode(
        self, cells_NTVC: Tensor, statics_NS: Tensor, hours_N: Tensor, *, variables_NV: Tensor | None = None
    ) -> dict[str, Tensor]:
        """z of every chunk by branch, [N, chunks, 1 + tokens, D], the statics' token first."""
        stays = self._stays(cells_NTVC, statics_NS, hours_N, variables_NV)
        return {name: self._normed(name, torch.stack(self._run(name, stays, None), 1)) for name in self.branches}

    def _normed(self, name: str, z: Tensor) -> Tensor:
        out: Tensor = self._branch(name).norm(z)
        return out

    def _branch(self, name: str) -> Branch:
        found = self.branches[name]
        assert isinstance(found, Branch)
        return found

    def _with_cells_hidden(self, cells_NTVC: Tensor) -> Tensor:
        """Some variables of each stay, and some hours, as if nothing had been measured."""
        stays, hours, variables, _ = cells_NTVC.shape
        config, device = self.config, cells_NTVC.device
        if not config.hide_variables and not config.hide_hours:
            return cells_NTVC
        of_variables = torch.rand(stays, 1, variables, device=device) < config.hide_variables
        share = torch.rand(stays, 1, 1, device=device) * config.hide_hours
        return hide_cells(cells_NTVC, of_variables | (torch.rand(stays, hours, 1, device=device) < share))

    def _stays(self, cells_NTVC: Tensor, statics_NS: Tensor, hours_N: Tensor, variables_NV: Tensor | None) -> StayBatch:
        self._check(cells_NTVC, statics_NS, hours_N, variables_NV)
        hours, longest = self.config.chunk_hours, self.config.longest
        if longest is not None and cells_NTVC.shape[1] > longest:
            if bool((hours_N > longest).any()):
                raise ValueError(
                    f"hours_N has a stay of {int(hours_N.max())} hours, and chunks={self.config.chunks} of "
                    f"chunk_hours={hours} hold {longest}; cut it, or build the model with share_fusion=True"
                )
            cells_NTVC = cells_NTVC[:, :longest]
        tokens = cells_NTVC.shape[1]
        cells_NTVC = F.pad(cells_NTVC, (0, 0, 0, 0, 0, max(-tokens % hours, hours if tokens == 0 else 0)))
        gone = torch.arange(cells_NTVC.shape[1], device=hours_N.device) >= hours_N[:, None]
        if bool(gone.any()):
            cells_NTVC = cells_NTVC.masked_fill(gone[..., None, None], 0.0)
        if variables_NV is not None:
            cells_NTVC = cells_NTVC.masked_fill(~variables_NV[:, None, :, None], 0.0)
        return StayBatch(cells_NTVC, statics_NS, hours_N, variables_NV)

    def _check(
        self,
        cells_NTVC: Tensor,
        statics_NS: Tensor,
        hours_N: Tensor,
        variables_NV: Tensor | None,
        hours_name: str = "hours_N",
    ) -> None:
        config, stays = self.config, len(cells_NTVC)
        expected = {
            "cells_NTVC": (cells_NTVC, (stays, cells_NTVC.shape[1], config.variables, CHANNELS)),
            "statics_NS": (statics_NS, (stays, config.statics)),
            hours_name: (hours_N, (stays,)),
            "variables_NV": (variables_NV, (stays, config.variables)),
        }
        for name, (tensor, shape) in expected.items():
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be {list(shape)}")
        if bool(((hours_N < 0) | (hours_N > cells_NTVC.shape[1])).any()):
            raise ValueError(
                f"{hours_name}={hours_N.tolist()} must lie between 0 and the {cells_NTVC.shape[1]} hours of cells_NTVC"
            )

    def _run(self, name: str, stays: StayBatch, edits: LayerEdits | None) -> list[Tensor]:
        """z after every chunk; a chunk of which a stay has no hour leaves its z as it was."""
        hours, found = self.config.chunk_hours, []
        z_NTD = None
        for chunk in range(stays.cells_NTVC.shape[1] // hours):
            begun_N = stays.hours_N > chunk * hours
            if z_NTD is None or bool(begun_N.all()):
                z_NTD = self._chunk(name, chunk, stays, stays.chunk(chunk, hours), z_NTD, edits)
            elif edits is None and bool(begun_N.any()):
                rows = begun_N.nonzero()[:, 0]  # of the others nothing need be computed
                some = stays.take(rows, chunk * hours, hours)
                new_NTD = self._chunk(name, chunk, some, some.chunk(0, hours), z_NTD[rows])
                z_NTD = z_NTD.index_copy(0, rows, new_NTD)
            else:  # edits are those of all stays; and where no stay goes on, weights must still have gradients
                new_NTD = self._chunk(name, chunk, stays, stays.chunk(chunk, hours), z_NTD, edits)
                z_NTD = torch.where(begun_N[:, None, None], new_NTD, z_NTD)
            found.append(z_NTD)
        return found

    def _chunk(
        self,
        name: str,
        chunk: int,
        stays: StayBatch,
        cells_NHVX: Tensor,
        before_NTD: Tensor | None,
        edits: LayerEdits | None = None,
    ) -> Tensor:
        branch = self._branch(name)
        x_NTD = branch.tokens(cells_NHVX, stays.statics_NS, stays.exist_NV, chunk * self.config.chunk_hours)
        exist_NT = branch.exist(stays.hours_N, chunk, stays.exist_NV)
        context = None
        if chunk:
            assert before_NTD is not None
            context = (before_NTD, branch.exist(stays.hours_N, chunk - 1, stays.exist_NV))
        own = {} if edits is None else {what: edits.get(f"{name}.{chunk}.{what}") for what in ("self", "cross")}
        given = {what: runs for what, runs in own.items() if runs is not None}
        out: Tensor = branch.encoder(chunk)(x_NTD, exist_NT, context, given)
        return out

    def _last_exist(self, name: str, stays: StayBatch) -> Tensor | None:
        """Which tokens of a stay's last chunk exist."""
        hours = self.config.chunk_hours
        if name == "temporal":
            last_N = (stays.hours_N - 1).clamp(min=0) // hours
            return self._branch(name).exist(stays.hours_N - last_N * hours, 0, None)
        exist_NV = torch.ones_like(stays.cells_NTVC[:, 0, :, 0], dtype=torch.bool)
        if stays.exist_NV is not None:
            exist_NV = stays.exist_NV
        some_N1 = (stays.hours_N > 0)[:, None]
        return None if stays.exist_NV is None and bool(some_N1.all()) else F.pad(exist_NV & some_N1, (1, 0), value=True)

    def _each_hour(self, name: str, zs: list[Tensor], stays: StayBatch) -> Tensor:
        """[N, T, 3 D] of what was known at each hour."""
        branch = self._branch(name)
        if name == "temporal":
            return torch.cat([branch.each_hour(z_NTD) for z_NTD in zs], dim=1)
        exist_NT = branch.exist(stays.hours_N, 0, stays.exist_NV)
        known = [torch.zeros_like(branch.pooled(zs[0], exist_NT)), *(branch.pooled(z, exist_NT) for z in zs[:-1])]
        return torch.stack(known, dim=1).repeat_interleave(self.config.chunk_hours, dim=1)

    def _features(self, stays: StayBatch) -> Tensor:
        """Summary features of the stays, [N, F], or of each of their hours, [N, T, F]."""
        cells_NTVC, hourly = stays.cells_NTVC, self.config.hourly
        found = summarise(cells_NTVC, each_hour=hourly)
        if hourly:
            passed_T = torch.arange(1, cells_NTVC.shape[1] + 1, device=cells_NTVC.device)
            return found.features(passed_T.expand(len(cells_NTVC), -1), cells_NTVC[..., GAP])
        rows_N = torch.arange(len(cells_NTVC), device=cells_NTVC.device)
        return found.at(-1).features(stays.hours_N, cells_NTVC[rows_N, (stays.hours_N - 1).clamp(min=0), :, GAP])

    def _logits(self, fused: list[Tensor], features: Tensor | None, statics: Tensor, each_part: bool = False) -> Tensor:
        of_summary = []
        if self.summary is not None:
            assert features is not None
            of_summary = [self.summary(torch.cat([features, statics.expand(*features.shape[:-1], -1)], dim=-1))]
        if isinstance(self.head, nn.ModuleDict):
            branches = [
                head(self.dropout(of_branch)) for head, of_branch in zip(self.head.values(), fused, strict=True)
            ]
            kinds = [torch.stack(branches).mean(0), *of_summary]  # attention has half a say, however many its branches
            logits = torch.stack([*branches, *of_summary] if each_part else kinds)
        else:
            logits = torch.stack([self.head(self.dropout(torch.cat(fused, -1))), *of_summary]).sum(0, keepdim=True)
        if self.config.head == "ordinal":  # thresholds that rise, so that P(bucket > k) falls
            rises = torch.cat([self.steps[:1], F.softplus(self.steps[1:])])
            logits = logits - rises.cumsum(0)
        return logits if each_part else logits.mean(0)

    def attentions(self) -> dict[str, Attention]:
        """Attention layers by branch, chunk and kind, such as "temporal.2.cross"."""
        found: dict[str, Attention] = {}
        for name in self.branches:
            for chunk in range(self.config.chunks):
                encoder = self._branch(name).encoder(chunk)
                found[f"{name}.{chunk}.self"] = encoder.attention
                if encoder.cross is not None:
                    found[f"{name}.{chunk}.cross"] = encoder.cross
        return found

    def plan_edits(self, edits: Edits, stays: int) -> dict[str, list[EditRun | None]]:
        """What reads and edits mean in every attention layer, for `forward`: one run a stay. Raises ValueError as
        `Edits.plan`."""
        runs: dict[str, list[EditRun | None]] = {}
        for name, attention in self.attentions().items():
            of_hours, cross = name.startswith("temporal"), name.endswith("cross")
            layout = TokenLayout(prompt=1 + (self.config.chunk_hours if of_hours else self.config.variables))
            sizes = [layer_sizes(attention, context=cross)]
            plan = edits.plan(sizes, replace(layout, context=layout) if cross else layout, streams=False)
            runs[name] = [EditRun(plan) for _ in range(stays)]
        return runs

    @torch.no_grad()
    def read_maps(
        self, cells_NTVC: Tensor, statics_NS: Tensor, hours_N: Tensor, *, variables_NV: Tensor | None = None
    ) -> EhrMaps:
        """All attention weights of these stays, by attnzoo.attention.edits. A chunk of which a stay has no hour has
        maps that mean nothing."""
        runs = self.plan_edits(Edits(Map(dtype="fp32")), len(cells_NTVC))
        stays = self._stays(cells_NTVC, statics_NS, hours_N, variables_NV)
        last = {name: self._run(name, stays, runs)[-1] for name in self.branches}
        weights = {name: self._branch(name).pool_weights(z, self._last_exist(name, stays)) for name, z in last.items()}
        maps = {
            name: torch.stack([run.reading[0].map for run in rows if run is not None])
            for name, rows in runs.items()
            if all(run is not None and len(run.reading) for run in rows)
        }
        return EhrMaps(maps, weights.get("temporal"), weights.get("spatial"))

    def init_state(self, statics_NS: Tensor, *, variables_NV: Tensor | None = None) -> EhrState:
        """The state of stays of which no hour has passed."""
        config, stays, like = self.config, len(statics_NS), next(self.parameters())

        def zeros(*shape: int) -> Tensor:
            return new_zeros(stays, *shape, device=like.device, dtype=like.dtype)

        exist_NV = torch.ones(stays, config.variables, dtype=torch.bool, device=like.device)
        return EhrState(
            hours_N=new_zeros(stays, device=like.device, dtype=torch.int64),
            statics_NS=statics_NS,
            exist_NV=exist_NV if variables_NV is None else variables_NV,
            cells_NHVC=zeros(config.chunk_hours, config.variables, CHANNELS),
            temporal_NTD=zeros(1 + config.chunk_hours, config.model_dim),
            spatial_NTD=zeros(1 + config.variables, config.model_dim),
            summary=Summary.empty(stays, config.variables, like.device, like.dtype),
        )

    def extend(self, cells_NTVC: Tensor, state: EhrState, counts_N: Tensor | None = None) -> tuple[Tensor, EhrState]:
        """Continues stays by hours: (logits [N, T, outputs], new state). counts_N: how many of the T hours of each stay
        are real, None: all; logits of the others are 0.

        Logits of an hour are those of `forward` for the stay up to it (where they are hourly, its last ones): z of
        earlier chunks is remembered, and the open chunk is computed anew with every hour. Raises ValueError as
        `forward`.
        """
        stays, hours = cells_NTVC.shape[:2]
        if counts_N is None:
            counts_N = torch.full((stays,), hours, device=cells_NTVC.device)
        self._check(cells_NTVC, state.statics_NS, counts_N, state.exist_NV, "counts_N")
        longest = self.config.longest
        if longest is not None and bool((state.hours_N + counts_N > longest).any()):
            raise ValueError(
                f"counts_N={counts_N.tolist()} more hours than the {longest} that chunks={self.config.chunks} of "
                f"chunk_hours={self.config.chunk_hours} hold; build the model with share_fusion=True"
            )
        found = [cells_NTVC.new_zeros(stays, 0, self.config.outputs)]
        for hour in range(hours):
            logits_NO, state = self._hour(cells_NTVC[:, hour], hour < counts_N, state)
            found.append(logits_NO[:, None])
        return torch.cat(found, dim=1), state

    def _hour(self, cells_NVC: Tensor, real_N: Tensor, state: EhrState) -> tuple[Tensor, EhrState]:
        """One hour more of the stays for which it is real."""
        chunk_hours = self.config.chunk_hours
        cells_NVC = cells_NVC.masked_fill(~(real_N[:, None, None] & state.exist_NV[..., None]), 0.0)
        place_N = state.hours_N % chunk_hours
        open_N111 = (~real_N | (place_N > 0))[:, None, None, None]  # else the hour begins a chunk
        here_NH = real_N[:, None] & (torch.arange(chunk_hours, device=place_N.device) == place_N[:, None])
        held_NHVC = state.cells_NHVC.masked_fill(~open_N111, 0.0)
        after = replace(
            state,
            hours_N=state.hours_N + real_N,
            cells_NHVC=torch.where(here_NH[..., None, None], cells_NVC[:, None], held_NHVC),
            summary=summarise(cells_NVC[:, None], state.summary, state.hours_N).at(-1),
        )
        logits_NO = cells_NVC.new_zeros(len(cells_NVC), self.config.outputs)
        for chunk in (state.hours_N // chunk_hours)[real_N].unique().tolist():
            rows = (real_N & (state.hours_N // chunk_hours == chunk)).nonzero()[:, 0]
            after, found = self._open_chunk(chunk, rows, after)
            logits_NO = logits_NO.index_copy(0, rows, found)
        return logits_NO, after

    def _open_chunk(self, chunk: int, rows: Tensor, state: EhrState) -> tuple[EhrState, Tensor]:
        """(the state with z of the chunk where it is full, logits after its last hour) of stays that are in it."""
        some = state.map(lambda _, tensor: tensor[rows])
        exist_NV = None if bool(some.exist_NV.all()) else some.exist_NV
        stays = StayBatch(some.cells_NHVC, some.statics_NS, some.hours_N, exist_NV)
        fused, full = [], some.hours_N % self.config.chunk_hours == 0
        for name in self.branches:
            branch, field = self._branch(name), f"{name}_NTD"
            before_NTD = getattr(some, field)
            z_NTD = self._chunk(name, chunk, stays, hinged(stays.cells_NTVC), before_NTD)
            if not self.config.hourly:
                fused.append(branch.pooled(z_NTD, self._last_exist(name, stays)))
            elif name == "temporal":
                last_N = (some.hours_N - 1) % self.config.chunk_hours
                fused.append(branch.each_hour(z_NTD)[torch.arange(len(rows), device=rows.device), last_N])
            else:
                known = branch.pooled(before_NTD, branch.exist(some.hours_N, 0, exist_NV))
                fused.append(known if chunk else torch.zeros_like(known))
            kept = getattr(state, field).index_copy(0, rows[full], z_NTD[full])
            state = replace(state, **{field: kept})
        features = None
        if self.summary is not None:
            last_N = (some.hours_N - 1) % self.config.chunk_hours
            gap_NV = some.cells_NHVC[torch.arange(len(rows), device=rows.device), last_N, :, GAP]
            features = some.summary.features(some.hours_N, gap_NV)
        return state, self._logits(fused, features, some.statics_NS)
