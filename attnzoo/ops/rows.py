"""One entry of every kv head, written in place."""

import torch
from torch import Tensor


def put(x_BKPX: Tensor, place_BK1: Tensor, new_BK1X: Tensor | float) -> None:
    """x[b, k, place] = new, for x of [B, K, P] or [B, K, P, X].

    Not `scatter_`: on a CPU its time is that of copying all of x.
    """
    batch, heads, _ = place_BK1.shape
    rows_B11 = torch.arange(batch, device=x_BKPX.device)[:, None, None]
    x_BKPX[rows_B11, torch.arange(heads, device=x_BKPX.device)[:, None], place_BK1] = new_BK1X
