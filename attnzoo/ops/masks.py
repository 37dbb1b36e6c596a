"""Which query may look at which key, from logical positions alone."""

import torch
from torch import Tensor


def causal_mask(query_positions_BT: Tensor, key_positions_BKS: Tensor) -> Tensor:
    """mask_BKTS: True where the key holds something (position >= 0) and is not after the query."""
    keys_BK1S = key_positions_BKS[:, :, None, :]
    return (keys_BK1S >= 0) & (keys_BK1S <= query_positions_BT[:, None, :, None])


def aligned_positions(tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions 0..T-1 of the parallel form, as (query_positions_1T, key_positions_11T)."""
    positions = torch.arange(tokens, device=device)
    return positions[None], positions[None, None]


def check_heads(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor) -> None:
    """Raises ValueError when batch, head or length axes of q, k and v do not fit together."""
    q, k, v = tuple(q_BNTH.shape), tuple(k_BKSH.shape), tuple(v_BKSH.shape)
    if len(q) != 4 or len(k) != 4 or len(v) != 4:
        raise ValueError(f"q, k and v need 4 axes [batch, heads, time, head_dim]; got q={q}, k={k}, v={v}")
    if q[0] != k[0] or k[:3] != v[:3] or q[3] != k[3] or q[1] % k[1]:
        raise ValueError(
            f"q={q}, k={k}, v={v} do not fit: batch must agree, k and v must agree in all but the last axis, "
            "q and k in the last, and query heads must be a multiple of kv heads"
        )
