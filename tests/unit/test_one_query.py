"""The attention of a decode step over many long sequences: what it computes, and how much of the cache it copies."""

import pytest
import torch
from torch import Tensor

from attnzoo.models.torch_compiler import has_compiler
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.sdpa import torch as sdpa
from attnzoo.ops.sdpa.torch import sdpa_torch
from attnzoo.profiling.memory import peak_bytes

B, N, K, S, H = 16, 4, 2, 1500, 32


def stored() -> tuple[Tensor, Tensor, Tensor, Mask]:
    """A query of each sequence, and keys and values as a server keeps them: what belongs to one sequence is together,
    with other things between it and the next one's."""
    torch.manual_seed(0)
    rows = torch.randn(B, 3, 2, K, S + 36, H).bfloat16()
    positions = torch.arange(S).expand(B, 1, S).clone()
    positions[1, :, 9:] = -1  # a short sequence
    mask = Mask(query_positions_BT=torch.full((B, 1), S), key_positions_BKS=positions)
    return torch.randn(B, N, 1, H).bfloat16(), rows[:, 1, 0, :, :S], rows[:, 1, 1, :, :S], mask


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    return sdpa_torch(q, k, v, mask, H**-0.5)


def in_double(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """By its definition."""
    exists_BKS = mask.key_positions_BKS >= 0
    k_BNSH, v_BNSH = (x.double().repeat_interleave(N // K, dim=1) for x in (k, v))
    scores = (q.double() @ k_BNSH.mT) * H**-0.5
    return scores.masked_fill(~exists_BKS[:, :, None], float("-inf")).softmax(-1) @ v_BNSH


@pytest.mark.parametrize("compiled", [False, True])
def test_a_few_sequences_are_copied_at_a_time(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of all keys at once leave the processor's cache, and the system gives new pages for them in every step:
    compiled, 32 sequences of 4,000 tokens took four times as long."""
    if compiled and not has_compiler():
        pytest.skip("torch's compiler needs a C++ compiler")
    monkeypatch.setattr(sdpa, "COPIED_BYTES", 3 * K * S * H * 2)  # three sequences
    call = torch.compile(attend, fullgraph=True) if compiled else attend
    with torch.inference_mode():
        work = stored()
        found = call(*work)
        torch.testing.assert_close(found.double(), in_double(*work), rtol=0, atol=2e-2)
        peak = peak_bytes(lambda: call(*work))
    keys = B * K * S * H * 2
    weights = B * N * S * 4
    assert peak < keys / 2 + 4 * weights, f"{peak / keys:.2f} of all keys"
