"""Training of a clinical encoder without labels: cells are hidden, and told from the others.

Hours, variables and whole chunks are hidden. A hidden chunk is seen by no token of its own, so telling it is a forecast
from the chunks before. The loss is the squared error of values that were measured, and some of the cross entropy of
whether a cell was (the idea and its weights: DuETT, 2023, arXiv 2304.13017).

Differs from the paper: it hides one hour and one variable of each stay, and no chunks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.models.ehr_cells import MEASURED, VALUE, hide_cells
from attnzoo.models.ehr_encoder import EhrEncoder

SHARE = 0.15
"""Probability with which an hour, and a variable, is hidden."""
CHUNK_SHARE = 0.25
"""Probability with which all cells of a chunk are hidden."""
PRESENCE = 0.2
"""Weight of whether a cell was measured, beside its value."""


class EhrPretraining(nn.Module):
    """An encoder with heads that tell the value of every cell, and whether it was measured, from the tokens of its hour
    and of its variable. The encoder's own head takes no part."""

    def __init__(self, encoder: EhrEncoder) -> None:
        super().__init__()
        config = encoder.config
        self.encoder = encoder
        cells = {"temporal": config.variables, "spatial": config.chunk_hours}
        self.heads = nn.ModuleDict({name: nn.Linear(config.model_dim, 2 * cells[name]) for name in encoder.branches})

    def forward(self, cells_NTVC: Tensor, statics_NS: Tensor, hours_N: Tensor) -> Tensor:
        """[N, T, V, 2]: value, and the logit of whether it was measured."""
        stays, tokens, variables, _ = cells_NTVC.shape
        told = cells_NTVC.new_zeros(())
        for name, z_NJTD in self.encoder.encode(cells_NTVC, statics_NS, hours_N).items():
            of_tokens = self.heads[name](z_NJTD[:, :, 1:])
            if name == "spatial":  # [N, chunks, V, H * 2], and hours are to stand before variables
                of_tokens = of_tokens.unflatten(-1, (-1, 2)).transpose(2, 3)
            told = told + of_tokens.reshape(stays, -1, variables, 2)
        return F.pad(told, (0, 0, 0, 0, 0, max(tokens - told.shape[1], 0)))[:, :tokens]

    def hidden(self, cells_NTVC: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """hidden_NTV (bool): which cells are to be told."""
        stays, hours, variables, _ = cells_NTVC.shape
        chunk_hours = self.encoder.config.chunk_hours

        def drawn(*shape: int) -> Tensor:
            return torch.rand(*shape, device=cells_NTVC.device, generator=generator)

        chunks = (drawn(stays, -(-hours // chunk_hours), 1) < CHUNK_SHARE).repeat_interleave(chunk_hours, dim=1)
        some = (drawn(stays, hours, 1) < SHARE) | (drawn(stays, 1, variables) < SHARE)
        return some | chunks[:, :hours]

    def loss(
        self, cells_NTVC: Tensor, statics_NS: Tensor, hours_N: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """The mean over hidden cells of hours that exist; 0 without any."""
        exist_NT = torch.arange(cells_NTVC.shape[1], device=hours_N.device) < hours_N[:, None]
        cells_NTVC = cells_NTVC.masked_fill(~exist_NT[..., None, None], 0.0)
        hidden_NTV = self.hidden(cells_NTVC, generator) & exist_NT[..., None]
        told = self(hide_cells(cells_NTVC, hidden_NTV), statics_NS, hours_N)
        measured_NTV = cells_NTVC[..., MEASURED]
        asked_NTV = hidden_NTV.to(told.dtype)
        errors = (told[..., 0] - cells_NTVC[..., VALUE]).square() * measured_NTV * asked_NTV
        missed = F.binary_cross_entropy_with_logits(told[..., 1], measured_NTV, reduction="none") * asked_NTV
        values = errors.sum() / (measured_NTV * asked_NTV).sum().clamp(min=1.0)
        return values + PRESENCE * missed.sum() / asked_NTV.sum().clamp(min=1.0)
