"""What an `EhrEncoder` is given, keeps of stays from hour to hour, and tells of its attention."""

from dataclasses import dataclass

from torch import Tensor

from attnzoo.kvcache.state import State
from attnzoo.models.ehr_blocks import hinged
from attnzoo.models.ehr_cells import Summary


@dataclass
class EhrState(State):
    """A stay up to some hour. cells_NHVC: the open chunk's hours, zeros after them; temporal_NTD, spatial_NTD: z of the
    chunk before it; exist_NV: which variables exist."""

    hours_N: Tensor
    statics_NS: Tensor
    exist_NV: Tensor
    cells_NHVC: Tensor
    temporal_NTD: Tensor
    spatial_NTD: Tensor
    summary: Summary


@dataclass(frozen=True)
class EhrMaps:
    """What attention looked at. maps: weights [N, heads, queries, keys] by the names of `EhrEncoder.attentions`, of
    which the first query and key are the statics; hours_NT, variables_NV: weights of the last chunk's hours and of
    variables in the pooled sums, None without that branch."""

    maps: dict[str, Tensor]
    hours_NT: Tensor | None
    variables_NV: Tensor | None


@dataclass(frozen=True)
class StayBatch:
    """A batch ready for the branches: cells of whole chunks, zeros where nothing exists; exist_NV None: all exist."""

    cells_NTVC: Tensor
    statics_NS: Tensor
    hours_N: Tensor
    exist_NV: Tensor | None

    def chunk(self, number: int, hours: int) -> Tensor:
        return hinged(self.cells_NTVC[:, number * hours : (number + 1) * hours])

    def take(self, rows: Tensor, first: int, hours: int) -> "StayBatch":
        exist_NV = None if self.exist_NV is None else self.exist_NV[rows]
        cells_NTVC = self.cells_NTVC[:, first : first + hours][rows]
        return StayBatch(cells_NTVC, self.statics_NS[rows], self.hours_N[rows], exist_NV)
