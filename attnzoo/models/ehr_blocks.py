"""What a clinical encoder is made of: tokens of cells, the encoder of a chunk, and a branch of them."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention import Attention, build_attention
from attnzoo.attention.edits import EditRuns
from attnzoo.models.blocks import MLP, attended, build_norm
from attnzoo.models.ehr_config import EhrConfig
from attnzoo.ops.common.masks import Mask

HINGED = 5
"""Channels of a cell as they are embedded: the value's positive part and its negative part, and the other three."""


def hinged(cells_NTVC: Tensor) -> Tensor:
    """Values split at 0, so that a variable can be alarming on both sides."""
    value = cells_NTVC[..., :1]
    return torch.cat([value.clamp(min=0.0), value.clamp(max=0.0), cells_NTVC[..., 1:]], dim=-1)


class CellTokens(nn.Module):
    """Tokens of a chunk's cells [N, H, V, HINGED], each cell embedded by weights of its variable.

    temporal: an hour is the sum of its cells' embeddings and a sinusoid of its place in the chunk. Spatial: a variable
    is the sum over the hours, times a weight for each hour and channel of the token, and the variable's own vector.
    The first token is that of the statics, and with a clock of the hours before the chunk; it always exists.
    """

    def __init__(self, config: EhrConfig, temporal: bool) -> None:
        super().__init__()
        self.temporal, dim = temporal, config.model_dim
        self.cell = nn.Parameter(torch.empty(config.variables, HINGED, dim))
        self.variable = nn.Parameter(torch.empty(config.variables, dim))
        self.statics = nn.Parameter(torch.empty(dim, config.statics))
        self.stay = nn.Parameter(torch.empty(dim))
        self.clock = nn.Parameter(torch.empty(2, dim)) if config.clock else None
        self.sinusoids: Tensor
        if temporal:
            self.register_buffer("sinusoids", sinusoids(config.chunk_hours, dim), persistent=False)
        else:
            self.hour = nn.Parameter(torch.empty(config.chunk_hours, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            if name == "hour":
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=0.2 if name == "variable" else 0.1)

    def forward(self, cells_NHVC: Tensor, statics_NS: Tensor, exist_NV: Tensor | None, before: int = 0) -> Tensor:
        """tokens_NTD, the statics' first: 1 + H of them, or 1 + V. before: hours before the chunk."""
        first_ND = statics_NS @ self.statics.T + self.stay
        if self.clock is not None:
            days = before / 24
            first_ND = first_ND + days / 7 * self.clock[0] + math.log1p(days) * self.clock[1]
        return torch.cat([first_ND[:, None], self.of_cells(cells_NHVC, exist_NV)], dim=1)

    def of_cells(self, cells_NHVC: Tensor, exist_NV: Tensor | None) -> Tensor:
        stays, hours, variables, channels = cells_NHVC.shape
        cell_VCD = self.cell[:variables]
        if self.temporal:
            of_hours = cells_NHVC.flatten(2) @ cell_VCD.flatten(0, 1) + self.sinusoids
            own_VD = self.variable[:variables]
            return of_hours + (own_VD.sum(0) if exist_NV is None else (exist_NV.to(own_VD.dtype) @ own_VD)[:, None])
        # One product for each variable: its rows are the cells of a stay's chunk.
        weight_VXD = (self.hour[:, None] * cell_VCD[:, None]).flatten(1, 2)
        rows_VNX = cells_NHVC.permute(2, 0, 1, 3).reshape(variables, stays, hours * channels)
        return torch.baddbmm(self.variable[:variables, None], rows_VNX, weight_VXD).transpose(0, 1)


def sinusoids(positions: int, dim: int) -> Tensor:
    """Sines of every position, then cosines (arXiv 1706.03762, section 3.5)."""
    rate = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * rate
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[:, :dim].float()


class ChunkEncoder(nn.Module):
    """An encoder (of the first chunk) or fusion encoder: self-attention, cross attention to what the chunks before have
    become, MLP; each is added to its input, with the norm before it (flavor "paper") or after the sum ("official").

    looks_ahead=False hides later tokens of the chunk from a token, in both attentions.
    """

    def __init__(self, config: EhrConfig, *, fusion: bool, looks_ahead: bool) -> None:
        super().__init__()
        kind, options = config.self_attention()
        dim, self.pre_norm, self.looks_ahead = config.model_dim, config.flavor == "paper", looks_ahead
        self.attention = build_attention(kind, options, "attention")
        self.attention_norm = build_norm("layernorm", dim)
        sizes: dict[str, object] = {"model_dim": dim, "num_heads": config.num_heads, "flavor": config.flavor}
        self.cross = build_attention("tscan", sizes) if fusion else None
        self.cross_norm = build_norm("layernorm", dim) if fusion else None
        self.context_norm = build_norm("layernorm", dim) if fusion and self.pre_norm else None
        self.mlp = MLP("relu", dim, config.mlp_dim, bias=True)
        self.mlp_norm = build_norm("layernorm", dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x_NTD: Tensor,
        exist_NT: Tensor | None,
        context: tuple[Tensor, Tensor | None] | None = None,
        edits: Mapping[str, EditRuns] | None = None,
    ) -> Tensor:
        """z_NTD. exist_NT: which tokens exist, None: all; context: z of the encoder before and which of it exist."""
        edits = edits or {}

        def attend(y_NTD: Tensor) -> Tensor:
            return self._attended(self.attention, y_NTD, None, exist_NT, edits.get("self"))

        def read(y_NTD: Tensor) -> Tensor:
            assert self.cross is not None
            assert context is not None
            z_NTD, z_exist_NT = context
            if self.context_norm is not None:
                z_NTD = self.context_norm(z_NTD)
            if exist_NT is not None:  # tokens are paired, and those that do not exist must be zeros
                y_NTD = y_NTD.masked_fill(~exist_NT[..., None], 0.0)
            return self._attended(self.cross, y_NTD, z_NTD, z_exist_NT, edits.get("cross"))

        x_NTD = self._added(x_NTD, attend, self.attention_norm)
        if self.cross_norm is not None:
            x_NTD = self._added(x_NTD, read, self.cross_norm)
        return self._added(x_NTD, self.mlp, self.mlp_norm)

    def _added(self, x_NTD: Tensor, part: Any, norm: nn.Module) -> Tensor:
        if self.pre_norm:
            out: Tensor = x_NTD + self.dropout(part(norm(x_NTD)))
        else:
            out = norm(x_NTD + self.dropout(part(x_NTD)))
        return out

    def _attended(
        self,
        attention: Attention,
        x_NTD: Tensor,
        context_NTD: Tensor | None,
        keys_NT: Tensor | None,
        edits: EditRuns | None,
    ) -> Tensor:
        tokens, pairs = x_NTD.shape[1], None
        if not self.looks_ahead:
            pairs = torch.ones(tokens, tokens, dtype=torch.bool, device=x_NTD.device).tril()
            pairs = pairs.expand(len(x_NTD), -1, -1)
        return attended(attention, x_NTD, Mask.full(keys_NT, pairs), edits, context_NTD)


class Branch(nn.Module):
    """One branch of TSCAN: tokens, an encoder for the first chunk, and fusion encoders for those after it."""

    def __init__(self, config: EhrConfig, temporal: bool) -> None:
        super().__init__()
        self.config, self.temporal = config, temporal
        self.tokens = CellTokens(config, temporal)
        hourly = temporal and config.hourly
        official = config.flavor == "official"
        own = 2 if config.share_fusion and config.chunks > 1 else config.chunks
        self.encoders = nn.ModuleList(
            ChunkEncoder(config, fusion=number > 0, looks_ahead=not (hourly or (official and number > 0)))
            for number in range(own)
        )
        self.norm = build_norm("layernorm", config.model_dim)
        self.query = nn.Parameter(torch.zeros(config.model_dim))

    def encoder(self, chunk: int) -> ChunkEncoder:
        """The encoder of a chunk; shared ones follow the first."""
        found = self.encoders[min(chunk, len(self.encoders) - 1)]
        assert isinstance(found, ChunkEncoder)
        return found

    def exist(self, hours_N: Tensor, chunk: int, exist_NV: Tensor | None) -> Tensor | None:
        """exist_NT: which tokens of a chunk there are, the statics' always; None: all."""
        if self.temporal:
            hours_H = torch.arange(self.config.chunk_hours, device=hours_N.device) + chunk * self.config.chunk_hours
            found = hours_H < hours_N[:, None]
            return None if bool(found.all()) else F.pad(found, (1, 0), value=True)
        return None if exist_NV is None else F.pad(exist_NV, (1, 0), value=True)

    def pooled(self, z_NTD: Tensor, exist_NT: Tensor | None) -> Tensor:
        """[N, 3 D]: the mean of the tokens, their sum by learned weights, and the statics' token."""
        z_NTD = self.norm(z_NTD)
        weights_NT = self.pool_weights(z_NTD, exist_NT, normed=True)
        even_NT = torch.ones_like(weights_NT) if exist_NT is None else exist_NT[:, 1:].to(weights_NT.dtype)
        even_NT = even_NT / even_NT.sum(-1, keepdim=True).clamp(min=1.0)
        both_N2D = torch.stack([even_NT, weights_NT], dim=1) @ z_NTD[:, 1:]
        return torch.cat([both_N2D.flatten(1), z_NTD[:, 0]], dim=-1)

    def pool_weights(self, z_NTD: Tensor, exist_NT: Tensor | None, normed: bool = False) -> Tensor:
        """weights_NT of hours or variables in the learned sum; 0 where nothing exists."""
        z_NTD = z_NTD if normed else self.norm(z_NTD)
        scores_NT = z_NTD[:, 1:] @ self.query
        if exist_NT is None:
            return scores_NT.softmax(-1)
        gaps = ~exist_NT[:, 1:]
        return scores_NT.masked_fill(gaps, torch.finfo(scores_NT.dtype).min).softmax(-1).masked_fill(gaps, 0.0)

    def each_hour(self, z_NTD: Tensor) -> Tensor:
        """[N, H, 3 D]: for each hour the mean of its chunk so far, the hour's own token, and the statics'."""
        z_NTD = self.norm(z_NTD)
        hours_NHD = z_NTD[:, 1:]
        number_H1 = torch.arange(1, hours_NHD.shape[1] + 1, device=z_NTD.device)[:, None]
        return torch.cat([hours_NHD.cumsum(1) / number_H1, hours_NHD, z_NTD[:, :1].expand_as(hours_NHD)], dim=-1)
