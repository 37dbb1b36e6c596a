"""The kernels of relative attention on a GPU: right in every dtype, repeatable, and how fast."""

import dataclasses

import pytest
import torch

from attnzoo.ops.common.masks import Mask, document_starts, padding_keys, padding_starts
from attnzoo.ops.common.tables import Tables
from tests.gpu.timing import milliseconds
from tests.helpers.attention_oracle import NAMES, dense_attention, leaves, random_inputs

DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
B, N, K, T = 2, 4, 2, 517
FUTURE = 30
"""Rows of the table for keys after the query."""


def attend(inputs, mask, scale):
    from attnzoo.ops.relative_sdpa.triton import relative_sdpa_triton

    tables = None if inputs[4] is None else Tables(*inputs[3:], FUTURE if mask.ahead else 0)
    return relative_sdpa_triton(*inputs[:3], tables, mask, scale)


def masks() -> dict[str, Mask]:
    documents = Mask(
        starts_BT=document_starts(torch.tensor([0, 3, T // 4, T // 4 + 1, T + T // 3, B * T], device=DEVICE), B, T)
    )
    keys = padding_keys(torch.tensor([T // 3, 0], device=DEVICE), T, "left")  # one row has no key at all
    return {
        "causal": Mask(),
        "documents": documents,
        "documents, window and sinks": dataclasses.replace(documents, window=70, sinks=4),
        "left padding": Mask(starts_BT=padding_starts(torch.tensor([T, T // 3], device=DEVICE), T, "left")),
        "right padding": Mask(starts_BT=padding_starts(torch.tensor([T, T // 3], device=DEVICE), T, "right")),
        "window": Mask(window=100),
        "full": Mask.full(keys),
        "prefix": Mask(prefix_B=torch.tensor([T // 2, 40], device=DEVICE), keys_BS=keys, window=70, sinks=4),
    }


def gradients(run, inputs, weight):
    out = run(inputs)
    (out * weight.to(out.dtype)).sum().backward()
    return [out.detach(), *(None if x is None else x.grad for x in inputs)]


MASKS = ("causal", "documents", "documents, window and sinks", "left padding", "right padding", "window")
AHEAD = ("full", "prefix")
CASES = [
    *((64, rows, name) for rows in (None, 1, 90, 600) for name in MASKS),
    *((head_dim, rows, name) for head_dim in (64, 128) for rows in (None, 90, 600) for name in AHEAD),
    *((head_dim, 90, MASKS[2]) for head_dim in (16, 40, 128, 256)),
    *((head_dim, None, MASKS[0]) for head_dim in (16, 40, 128, 256)),
]
"""(head dim, rows of the table, mask): every mask at one width, every width with the mask that asks most."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "rows", "name"), CASES)
def test_output_and_gradients(head_dim, rows, name, dtype):
    """No worse than twice the error of dense attention in the same dtype, gradients included."""
    mask, scale = masks()[name], head_dim**-0.5
    future = FUTURE if mask.ahead else 0
    inputs = [None if x is None else x.to(DEVICE, dtype) for x in random_inputs(B, N, K, T, head_dim, rows)]
    weight = torch.randn(B, N, T, head_dim, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))
    exact = gradients(
        lambda x: dense_attention(x, mask, scale, future_rows=future), leaves(inputs, dtype=torch.float64), weight
    )
    rough = gradients(lambda x: dense_attention(x, mask, scale, dtype, future), leaves(inputs), weight)
    found = gradients(lambda x: attend(x, mask, scale), leaves(inputs), weight)
    for label, a, b, c in zip(("out", *NAMES), found, rough, exact, strict=True):
        if a is not None:
            error, allowed = (a.double() - c).abs().max(), (b.double() - c).abs().max()
            floor = 4 * torch.finfo(dtype).eps * c.abs().max()
            assert error <= 2 * allowed + floor, f"{label}: {error} against {allowed}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_is_repeatable(dtype):
    inputs = [x.to(DEVICE, dtype) for x in random_inputs(B, N, K, T, 64, 90)]
    mask = masks()["documents"]
    runs = [gradients(lambda x: attend(x, mask, 0.1), leaves(inputs), torch.ones(1, device=DEVICE)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_streaming(dtype, tokens):
    entries = 300
    generator = torch.Generator().manual_seed(0)
    keys = torch.stack([torch.stack([torch.randperm(400, generator=generator)[:entries] for _ in range(K)])] * B)
    keys[:, :, ::7] = -1
    queries = torch.arange(tokens)[None] + 350
    mask = Mask(query_positions_BT=queries.to(DEVICE), key_positions_BKS=keys.to(DEVICE), window=128, sinks=4)
    q, _, _, *parameters = (x.to(DEVICE, dtype) for x in random_inputs(B, N, K, tokens, 64, 200))
    _, k, v, *_ = (x if x is None else x.to(DEVICE, dtype) for x in random_inputs(B, N, K, entries, 64, None, seed=1))
    expected = dense_attention([q, k, v, *parameters], mask, 0.125)
    empty = (keys < 0)[..., None].to(DEVICE)
    found = attend(
        [q, k.masked_fill(empty, float("nan")), v.masked_fill(empty, float("nan")), *parameters], mask, 0.125
    )
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("rows", [None, 512, 4096])
def test_how_fast(rows, capsys):
    """Prints milliseconds of forward and of forward with backward; asserts nothing."""
    sizes = (4, 16, 16, 4096, 64)
    inputs = leaves([None if x is None else x.to(DEVICE, torch.bfloat16) for x in random_inputs(*sizes, rows)])

    def forward():
        return attend(inputs, Mask(), 0.125)

    def both():
        forward().sum().backward()

    times = {run.__name__: milliseconds(run) for run in (forward, both)}
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name()} bf16 B,N,K,T,H={sizes} P={rows}: {times} ms")
