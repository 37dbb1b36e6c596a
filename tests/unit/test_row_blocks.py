"""Blocks of rows: every mask and table against dense sums across the borders of blocks, memory linear in T."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from attnzoo.ops.common import row_blocks
from attnzoo.ops.common.masks import Mask, document_starts, padding_keys, padding_starts
from attnzoo.ops.common.row_blocks import row_block_attention
from attnzoo.ops.common.tables import Tables
from attnzoo.ops.sdpa.reference import sdpa_reference

B, N, K, T, H = 2, 4, 2, 45, 6
STARTS = document_starts(torch.tensor([0, 3, 4, 30, 45, 61, 90]), B, T)
MASKS = {
    "causal": Mask(),
    "window": Mask(window=7),
    "window of one": Mask(window=1),
    "window of a block": Mask(window=16, sinks=1),
    "sinks": Mask(window=5, sinks=3),
    "sinks of more than a block": Mask(window=3, sinks=20),
    "documents": Mask(starts_BT=STARTS),
    "documents, window, sinks": Mask(starts_BT=STARTS, window=6, sinks=2),
    "left padding": Mask(starts_BT=padding_starts(torch.tensor([13, 45]), T, "left")),
    "right padding": Mask(starts_BT=padding_starts(torch.tensor([13, 45]), T, "right"), window=9),
}


def rand(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def some_keys(entries: int) -> torch.Tensor:
    """Two of three keys exist, in no order; of the last row none."""
    keys_BS = torch.rand(B, entries, generator=torch.Generator().manual_seed(5)) < 0.67
    keys_BS[-1] = False
    return keys_BS


PREFIX = torch.tensor([37, 3])
AHEAD = {
    "full": (T, Mask.full()),
    "more keys": (71, Mask.full(some_keys(71))),
    "fewer keys": (11, Mask.full(padding_keys(torch.tensor([10, 1]), 11, "left"))),
    "prefix": (T, Mask(prefix_B=PREFIX)),
    "prefix of all": (T, Mask(prefix_B=torch.tensor([T, 16]))),
    "no prefix": (T, Mask(prefix_B=torch.tensor([1, 0]))),
    "prefix, window, sinks, some keys": (T, Mask(prefix_B=PREFIX, window=5, sinks=3, keys_BS=some_keys(T))),
}


def dense(q, k, v, tables: Tables | None, mask: Mask, scale: float) -> torch.Tensor:
    """The definition, all pairs at once."""
    entries = k.shape[2]
    k, v = k.repeat_interleave(N // K, dim=1), v.repeat_interleave(N // K, dim=1)
    scores = q @ k.mT
    if tables is not None:
        rows = torch.arange(T)[:, None] - torch.arange(entries) + tables.future_rows
        rows = rows.clamp(0, tables.table_NPH.shape[1] - 1)
        scores = (q + tables.content_bias_NH[:, None]) @ k.mT
        channels = tables.table_NPH.shape[2]
        scores = scores + torch.einsum("bnth,ntsh->bnts", q[..., :channels], tables.table_NPH[:, rows])
        scores = scores + tables.table_bias_NP[:, rows]
    hidden = ~mask.visible(T, entries, q.device)
    empty = hidden.all(-1, keepdim=True)
    weights = (scores * scale).masked_fill(hidden & ~empty, float("-inf")).softmax(-1)
    return weights.masked_fill(empty, 0.0) @ v


@pytest.mark.parametrize(
    ("block", "tile"), [(16, 1), (16, 13_000), (64, 2 << 20)], ids=["a head at a time", "two heads", "all at once"]
)
@pytest.mark.parametrize(
    ("rows", "channels"),
    [(0, H), (1, H), (11, H), (45, H), (60, H), (1, 0), (11, 0), (60, 0)],
    ids=str,
)
@pytest.mark.parametrize("name", MASKS)
def test_outputs_and_gradients_against_all_pairs_at_once(name, rows, channels, block, tile, monkeypatch):
    """Also where the table has no channels: a bias by distance alone."""
    monkeypatch.setattr(row_blocks, "BLOCK", block)
    monkeypatch.setattr(row_blocks, "TILE_BYTES", tile)
    check(MASKS[name], T, rows, 0, channels)


@pytest.mark.parametrize(("block", "tile"), [(16, 13_000), (64, 2 << 20)], ids=["two heads", "all at once"])
@pytest.mark.parametrize(
    ("rows", "future", "channels"), [(0, 0, H), (2, 1, H), (11, 4, H), (120, 60, H), (50, 49, H), (11, 4, 0)], ids=str
)
@pytest.mark.parametrize("name", AHEAD)
def test_keys_after_the_query_and_keys_that_do_not_exist(name, rows, future, channels, block, tile, monkeypatch):
    """Queries that see nothing get exactly zeros; no gradient is NaN."""
    monkeypatch.setattr(row_blocks, "BLOCK", block)
    monkeypatch.setattr(row_blocks, "TILE_BYTES", tile)
    entries, mask = AHEAD[name]
    actual, q_grad = check(mask, entries, rows, future, channels)
    empty = ~mask.visible(T, entries, actual.device).any(-1).expand(B, N, -1)
    assert (actual[empty] == 0.0).all()
    assert (q_grad[empty] == 0.0).all()


def check(mask: Mask, entries: int, rows: int, future: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and gradients against all pairs at once; returns the output and the gradient of the queries."""
    inputs = [rand(B, N, T, H, seed=0), rand(B, K, entries, H, seed=1), rand(B, K, entries, H, seed=2)]
    tables = None
    if rows:
        tables = Tables(rand(N, H, seed=3), rand(N, rows, channels, seed=4), rand(N, rows, seed=5), future)
        inputs += [tables.content_bias_NH, tables.table_NPH, tables.table_bias_NP]
    actual = row_block_attention(*inputs[:3], tables, mask, 0.3)
    expected = dense(*inputs[:3], tables, mask, 0.3)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    weights = torch.randn(actual.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    grads, right = (torch.autograd.grad((out * weights).sum(), inputs) for out in (actual, expected))
    for got, want in zip(grads, right, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    return actual, grads[0]


def test_gradients_are_deterministic():
    inputs = [rand(1, N, 200, H, seed=0), rand(1, K, 200, H, seed=1), rand(1, K, 200, H, seed=2)]
    tables = Tables(rand(N, H, seed=3), rand(N, 90, H, seed=4), rand(N, 90, seed=5))
    inputs += [tables.content_bias_NH, tables.table_NPH, tables.table_bias_NP]

    def gradients() -> tuple[torch.Tensor, ...]:
        out = row_block_attention(*inputs[:3], tables, Mask(), 0.3)
        return torch.autograd.grad(out.square().sum(), inputs)

    for first, second in zip(gradients(), gradients(), strict=True):
        assert torch.equal(first, second)


def peak_bytes(tokens: int) -> int:
    """Largest sum of live allocations of a forward and backward with a table, beyond inputs."""
    inputs = [torch.randn(1, 2, tokens, 8, requires_grad=True) for _ in range(3)]
    tables = Tables(*(torch.zeros(*shape, requires_grad=True) for shape in ((2, 8), (2, tokens, 8), (2, tokens))))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        row_block_attention(*inputs, tables, Mask(), 0.3).sum().backward()
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_memory_is_linear_in_the_length():
    small, large = peak_bytes(512), peak_bytes(1024)
    assert 1.9 < large / small < 2.1
    assert large < 4 * 2 * 1024 * 1024, "as much as one matrix of scores of all pairs"


@pytest.mark.heavy
def test_a_first_prompt_does_not_wait_for_the_compiler():
    """Torch imports it when a custom operator is first called, which takes seconds."""
    code = (
        "import sys, torch; from attnzoo.ops.common.masks import Mask;"
        "from attnzoo.ops.common.row_blocks import row_block_attention;"
        "q = torch.randn(1, 2, 5, 8); torch.set_grad_enabled(False);"
        "row_block_attention(q, q, q, None, Mask(), 0.3); print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_short_rows_of_many_masks_are_computed_together():
    """Sequences of one block are one group, each under its own mask; longer ones are computed one by one, because
    blocks leave out keys that their own mask hides."""
    masks = {
        "documents": Mask(starts_BT=torch.tensor([[0, 0, 2, 2, 2], [0, 1, 1, 1, 4], [0, 0, 0, 0, 0]])),
        "padding": Mask.full(padding_keys(torch.tensor([5, 0, 3]), 5, "left")),
        "prefix": Mask(prefix_B=torch.tensor([5, 0, 3])),
    }
    q, k, v = (
        torch.randn(3, 2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (1, 2, 3)
    )
    for name, mask in masks.items():
        assert row_blocks.group_size(3, 2, 5, 5, mask, 8) == (2, 3), name
        assert row_blocks.group_size(3, 2, row_blocks.BLOCK + 1, 5, mask, 8) == (2, 1), name
        together = row_block_attention(q, k, v, None, mask, 0.5)
        for row in range(3):
            fields = {f: getattr(mask, f) for f in ("starts_BT", "keys_BS", "prefix_B")}
            one = replace(mask, **{f: None if x is None else x[row : row + 1] for f, x in fields.items()})
            expected = sdpa_reference(*(x[row : row + 1] for x in (q, k, v)), one, 0.5)
            torch.testing.assert_close(together[row : row + 1], expected, rtol=0, atol=1e-12, msg=f"{name}, row {row}")
