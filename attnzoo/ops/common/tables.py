"""Relative terms as tables by distance: what all operations with a position share."""

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from attnzoo.types import accumulation_dtype


@dataclass(frozen=True)
class Tables:
    """u_NH added to the queries where they meet keys; table_NPH and table_bias_NP by distance: row p is that of the
    distance p - future_rows between a query and a key before it, the first and the last row that of all farther ones.
    With `future_rows` 0 keys after the query have none. A table of no channels, [N, P, 0], meets no queries: distance
    adds its bias and nothing else."""

    content_bias_NH: Tensor
    table_NPH: Tensor
    table_bias_NP: Tensor
    future_rows: int = 0

    @classmethod
    def of_bias(cls, bias_NP: Tensor, head_dim: int, scale: float, future_rows: int = 0) -> "Tables":
        """A bias that is added after the scale, and nothing else."""
        # Distances of thousands need more digits than half precision has.
        exact = bias_NP.to(accumulation_dtype(bias_NP.dtype))
        heads, rows = exact.shape
        return cls(exact.new_zeros(heads, head_dim), exact.new_zeros(heads, rows, 0), exact / scale, future_rows)

    def past(self) -> "Tables":
        """Without the rows for keys after the query, for masks that show none."""
        if not self.future_rows:
            return self
        table_NPH, table_bias_NP = (x[:, self.future_rows :] for x in (self.table_NPH, self.table_bias_NP))
        return Tables(self.content_bias_NH, table_NPH, table_bias_NP)

    def whole(self, head_dim: int) -> "Tables":
        """With zeros for channels that the table lacks, for kernels that multiply by all of them."""
        missing = head_dim - self.table_NPH.shape[2]
        return replace(self, table_NPH=F.pad(self.table_NPH, (0, missing))) if missing else self


def add_rows(target_NP: Tensor, rows_NL: Tensor, reach: tuple[int, int], future_rows: int) -> None:
    """Adds rows by distance, the farthest behind first, to a table: only its first and last row get more than one, in
    a fixed order."""
    last, (behind, ahead) = target_NP.shape[1] - 1, reach
    shared = max(behind + future_rows - last + 1, 0)
    target_NP[:, last] += rows_NL[:, :shared].sum(1)
    if future_rows:
        kept = behind + 1 + min(ahead, future_rows - 1)
        target_NP[:, 0] += rows_NL[:, kept:].sum(1)
        rows_NL, ahead = rows_NL[:, :kept], min(ahead, future_rows - 1)
    target_NP[:, future_rows - ahead : min(last, behind + future_rows + 1)] += rows_NL[:, shared:].flip(1)
