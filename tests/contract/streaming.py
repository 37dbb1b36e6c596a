"""A sequence continued from its state gives what the parallel form gives, however it is cut, saved or batched."""

import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnzoo.kvcache import load_state, save_state
from attnzoo.types import accumulation_dtype
from tests.contract.cases import BATCH, MODEL_DIM, TOKENS, Build, assert_close, inputs, stream, streams


def check_state(build: Build) -> None:
    """The empty state is zeros, batch first, in the dtype that is asked for or in which sums are kept; `extend` keeps
    the structure."""
    if not streams(build()):
        return
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        attention = build().to(dtype)
        asked: dict[str, dict[str, Any]] = {"": {}, f", dtype={dtype}, device='cpu'": {"dtype": dtype, "device": "cpu"}}
        for call, options in asked.items():
            state = attention.init_state(3, 5, **options)
            for name, tensor in state.tensors().items():
                what = f"init_state(3, 5{call}) of a layer in {dtype}: {name}"
                assert tensor.shape[0] == 3, f"{what} has shape {list(tensor.shape)}; the batch comes first"
                assert not tensor.any(), f"{what} is not all zeros, which is what an empty slot of a server is"
                if tensor.is_floating_point():
                    right = (dtype, accumulation_dtype(dtype))
                    assert tensor.dtype in right, f"{what} is {tensor.dtype}; make it as `dtype` says, or the weights"
        before = {name: (x.dtype, x.dim()) for name, x in state.tensors().items()}
        with torch.no_grad():
            out, state = attention.extend(inputs(3, 2, MODEL_DIM).to(dtype), state)
        assert out.dtype == dtype, f"extend of a layer in {dtype} returns {out.dtype}"
        after = {name: (x.dtype, x.dim()) for name, x in state.tensors().items()}
        assert after == before, f"extend changes the structure of the state, from {before} to {after}"


def check_partitions(build: Build) -> None:
    """extend over any partition == forward: all ones, one chunk, random cuts, with and without room to grow."""
    attention, x = build(), inputs(BATCH, TOKENS, MODEL_DIM)
    if not streams(attention):
        return
    generator = torch.Generator().manual_seed(2)
    partitions = [[1] * TOKENS, [TOKENS]]
    for _ in range(6):
        marks = torch.randperm(TOKENS - 1, generator=generator)[: int(torch.randint(1, 6, (), generator=generator))]
        edges = [0, *sorted((marks + 1).tolist()), TOKENS]
        partitions.append([end - start for start, end in itertools.pairwise(edges)])
    with torch.no_grad():
        expected = attention(x)
        for cuts in partitions:
            for capacity in (TOKENS, 3):
                assert_close(stream(attention, x, cuts, capacity), expected, f"extend over {cuts}, room {capacity}")


def check_saved_state(build: Build) -> None:
    """A state saved to disk and loaded continues the same sequence."""
    attention, x = build(), inputs(BATCH, TOKENS, MODEL_DIM)
    if not streams(attention):
        return
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        first, state = attention.extend(x[:, :5], attention.init_state(BATCH, TOKENS))
        path = Path(folder) / "state.safetensors"
        save_state(state, path)
        second, _ = attention.extend(x[:, 5:], load_state(attention.init_state(BATCH, TOKENS), path))
        assert_close(torch.cat([first, second], dim=1), attention(x), "continued from a saved state")


def check_unequal_batch(build: Build) -> None:
    """Rows of different lengths in one batch equal the single runs; padding may hold anything, NaN included."""
    attention = build()
    if not streams(attention):
        return
    first, second = [3, 7, 0], [5, 1, 4]
    x = inputs(3, 12, MODEL_DIM)
    with torch.no_grad():
        state = attention.init_state(3, 12)
        outputs: list[list[Tensor]] = [[], [], []]
        used = [0, 0, 0]
        for counts in (first, second):
            chunk = torch.full((3, max(counts), MODEL_DIM), float("nan"), dtype=torch.float64)
            for row, count in enumerate(counts):
                chunk[row, :count] = x[row, used[row] : used[row] + count]
            out, state = attention.extend(chunk, state, torch.tensor(counts))
            for row, count in enumerate(counts):
                outputs[row].append(out[row, :count])
                used[row] += count
        for row in range(3):
            alone = attention(x[row : row + 1, : used[row]])[0]
            what = (
                f"row {row} of a batch with counts_B={first} and then {second} (the rest of a row is padding, NaN here)"
            )
            assert_close(torch.cat(outputs[row]), alone, what)


def check_empty_chunk_keeps_state(build: Build) -> None:
    """A row with no real tokens in a chunk keeps its state, bit for bit."""
    attention, x = build(), inputs(BATCH, TOKENS, MODEL_DIM)
    if not streams(attention):
        return
    with torch.no_grad():
        _, state = attention.extend(x[:, :5], attention.init_state(BATCH, TOKENS))
        before = {name: tensor.clone() for name, tensor in state.tensors().items()}
        _, state = attention.extend(x[:, 5:8], state, torch.tensor([3, 0]))
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor[1], before[name][1]), (
            f"{name} of row 1 changed in a chunk of which counts_B=[3, 0] says that none of its tokens is real"
        )


def check_rows(build: Build) -> None:
    """A pool of sequences: extending a slice of rows and storing it leaves the other rows alone."""
    attention, x = build(), inputs(3, TOKENS, MODEL_DIM)
    if not streams(attention):
        return
    with torch.no_grad():
        pool = attention.init_state(3, TOKENS)
        for row in (2, 0, 1):
            _, state = attention.extend(x[row : row + 1, : row + 4], pool.rows(slice(row, row + 1)))
            pool.store(slice(row, row + 1), state)
        pool.reset(slice(1, 2))
        for row, seen in ((0, 4), (1, 0), (2, 6)):
            out, _ = attention.extend(x[row : row + 1, seen : seen + 3], pool.clone().rows(slice(row, row + 1)))
            alone = attention(x[row : row + 1, : seen + 3])[:, seen:]
            assert_close(out, alone, f"row {row} of a pool")


def check_batch(build: Build) -> None:
    """A row's result does not depend on the rows beside it."""
    attention, x = build(), inputs(3, TOKENS, MODEL_DIM)
    with torch.no_grad():
        together = attention(x)
        for row in range(3):
            assert_close(together[row], attention(x[row : row + 1])[0], f"row {row} of a batch")
