"""Blocks of tokens: all running sums of a block at once, then one batched Cholesky factorisation.

Solving against sums, rather than updating an inverse by Sherman and Morrison's formula, keeps the state a plain sum
(zeros when empty, as in every state) and keeps errors from adding up. It costs H^3 / 3 per token where the update costs
H^2, but needs no loop over tokens. With documents, prefix sums that restart are made by doubling; subtraction would
cancel digits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.common.rows import known
from attnzoo.types import accumulation_dtype

BLOCK = 64
"""Tokens whose [H, H] sums are held at once."""


def ridge_queries_torch(
    q_BNTH: Tensor,
    k_BKTH: Tensor,
    ridge_K: Tensor,
    gram_BKHH: Tensor | None,
    counts_B: Tensor | None,
    starts_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(q_BNTH.device.type, enabled=False):
        dtype = accumulation_dtype(q_BNTH.dtype)
        batch, kv_heads, tokens, head_dim = k_BKTH.shape
        q, k, ridge = q_BNTH.to(dtype), k_BKTH.to(dtype), ridge_K.to(dtype)
        if counts_B is not None:
            padding_B1T1 = (torch.arange(tokens, device=q.device) >= counts_B[:, None])[:, None, :, None]
            q, k = q.masked_fill(padding_B1T1, 0.0), k.masked_fill(padding_B1T1, 0.0)
        q_BKTHG = q.unflatten(1, (kv_heads, -1)).permute(0, 1, 3, 4, 2)
        gram = k.new_zeros(batch, kv_heads, head_dim, head_dim) if gram_BKHH is None else gram_BKHH
        ridge_K1HH = ridge[:, None, None, None] * torch.eye(head_dim, dtype=dtype, device=q.device)
        solved = []
        for first in range(0, tokens, BLOCK):
            block = slice(first, min(first + BLOCK, tokens))
            sums_BKTHH = _running_sums(k[:, :, block], gram, None if starts_BT is None else starts_BT[:, block] - first)
            gram = sums_BKTHH[:, :, -1].clone()  # a view would keep the sums of the whole block alive
            factor_BKTHH = _factor(sums_BKTHH + ridge_K1HH)
            solved.append(torch.cholesky_solve(q_BKTHG[:, :, block], factor_BKTHH))
        solved_BKTHG = torch.cat(solved, dim=2) if len(solved) > 1 else solved[0]
        return solved_BKTHG.permute(0, 1, 4, 2, 3).flatten(1, 2), gram


def _factor(matrix_BKTHH: Tensor) -> Tensor:
    """The Cholesky factor; NaN where the matrix holds NaN or infinities, so that other sequences keep their outputs.
    Raises LinAlgError for one of finite numbers that has no factor."""
    factor_BKTHH, info_BKT = torch.linalg.cholesky_ex(matrix_BKTHH)
    failed_BKT = info_BKT > 0
    if not known(failed_BKT.any()):  # on a GPU nobody waits for it: what holds NaN has a factor of NaN there
        return factor_BKTHH
    finite_BKT = matrix_BKTHH.isfinite().all(-1).all(-1)
    if known((failed_BKT & finite_BKT).any()):
        return torch.linalg.cholesky(matrix_BKTHH)
    return factor_BKTHH.masked_fill(failed_BKT[..., None, None], torch.nan)


def _running_sums(k_BKTH: Tensor, gram_BKHH: Tensor, starts_BT: Tensor | None) -> Tensor:
    """sums_BKTHH over the tokens of a block; `starts_BT` relative to the block, negative for an earlier one."""
    outer = k_BKTH[..., :, None] * k_BKTH[..., None, :]
    if starts_BT is None:
        return outer.cumsum(dim=2) + gram_BKHH[:, :, None]
    index_T = torch.arange(k_BKTH.shape[2], device=k_BKTH.device)
    reach = 1
    while reach < len(index_T):
        # After each round a sum spans the last 2 * reach tokens, as far as its document goes back.
        within_B1T11 = (index_T - reach >= starts_BT.clamp(min=0))[:, None, :, None, None]
        earlier = F.pad(outer, (0, 0, 0, 0, reach, 0))[:, :, : len(index_T)]
        outer = outer + earlier.masked_fill(~within_B1T11, 0.0)
        reach *= 2
    return outer + gram_BKHH[:, :, None].masked_fill((starts_BT >= 0)[:, None, :, None, None], 0.0)
