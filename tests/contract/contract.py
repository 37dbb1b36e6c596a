"""What every attention variant must keep; `verify_contract` checks all of it.

Sizes are odd or prime and all different where the maths allows, so that a transposed axis fails.
"""

import dataclasses
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError
from torch.utils._python_dispatch import TorchDispatchMode

from attnzoo.attention import ATTENTION, Attention, build_attention
from attnzoo.attention.composed import ComposedAttention
from attnzoo.attention.parts import SoftmaxMixing
from attnzoo.kvcache import load_state, save_state
from attnzoo.ops.common.masks import CausalMask, document_starts, padding_starts
from attnzoo.types import accumulation_dtype
from tests.contract.by_hand import BY_HAND
from tests.contract.served import check_served

BATCH, TOKENS, MODEL_DIM = 2, 13, 22
TIGHT = 1e-10
"""Largest difference of two float64 results that differ only in the order of sums, for values of order 1; of larger
ones in proportion: processors sum in different orders."""

Build = Callable[[], Attention]

CASES: dict[str, list[dict[str, Any]]] = {
    "mha": [
        {},
        {"num_kv_heads": 1},
        {"position": "none"},
        {"qkv_bias": True, "output_bias": True},
        {"window": 4},
        {"window": 3, "sinks": 2, "num_kv_heads": 1},
        {"qk_norm": True, "num_kv_heads": 1},
        {"rope_scaling": {"kind": "llama3", "factor": 4.0, "original_max_positions": 64}},
        {"rope_scaling": {"kind": "linear", "factor": 3.0}},
    ],
    "rmha": [
        {},
        {"num_kv_heads": 1},
        {"window": 3, "sinks": 2},
        {"position": "sinusoid"},
        {"position": "sinusoid", "num_kv_heads": 1},
        {"position": "sinusoid", "window": 4, "sinks": 1},
        {"qkv_bias": True, "output_bias": True, "num_kv_heads": 1},
        {"position": "sinusoid", "qkv_bias": True, "output_bias": True},
    ],
    "mdha": [
        {},
        {"position": "none", "conv_share_heads": True, "conv_bias": True, "conv_init": "uniform"},
        {"num_kv_heads": 1, "conv_width": 4},
        {"window": 1},
        {"qkv_bias": True, "output_bias": True, "conv_bias": True},
    ],
    "rcmha": [
        {},
        {"conv_share_heads": True, "conv_bias": True, "conv_init": "uniform"},
        {"num_kv_heads": 1, "conv_width": 2},
        {"window": 4, "sinks": 3},
        {"qkv_bias": True, "output_bias": True, "conv_bias": True, "conv_share_heads": True},
    ],
    "linear": [
        {},
        {"normalise": False, "decay": False, "feature_map": "identity"},
        {"normalise": False, "feature_map": "relu", "num_kv_heads": 1},
        {"decay": False, "num_kv_heads": 1},
    ],
    "mesa": [{}, {"num_kv_heads": 1, "ridge": 0.3}],
    "in_context_linear": [{}, {"num_heads": 1, "head_dim": None, "num_queries": 0}],
    "softmax_regression": [{}, {"num_heads": 1, "head_dim": None, "num_queries": 3}],
}
"""Options to test beside the defaults; a variant that is not named here says its own (`Attention.cases`)."""

SIZES = {"model_dim": MODEL_DIM, "num_heads": 3, "head_dim": 14, "max_distance": 7}


def all_cases() -> list[tuple[str, dict[str, Any]]]:
    """(kind, options) of every registered variant, the defaults first."""
    return [(kind, options) for kind in ATTENTION for options in cases_of(kind)]


def cases_of(kind: str) -> list[dict[str, Any]]:
    """Options that are tested; the defaults are whatever else is asked for."""
    asked = [dict(options) for options in CASES.get(kind, ATTENTION.get(kind).cases)]
    return asked if {} in asked else [{}, *asked]


def case_name(kind: str, options: dict[str, Any]) -> str:
    return "-".join([kind, *(f"{key}={value}" for key, value in options.items())])


def build_case(kind: str, options: dict[str, Any], seed: int = 0) -> Attention:
    """The variant at the contract's sizes in float64, every trained parameter random: zero tables would hide
    mistakes."""
    attention = build_sized(kind, options).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in attention.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    return attention


def build_sized(kind: str, options: dict[str, Any]) -> Attention:
    """The variant at the contract's sizes, as its Config has fields for them; without `head_dim`, with a number of
    heads that divides model_dim. Raises AssertionError where nothing can be built."""
    fields = {field.name for field in dataclasses.fields(ATTENTION.get(kind).Config)}
    assert "model_dim" in fields, f"the Config of {kind!r} has no model_dim: make it the first field, without a default"
    sizes = {key: value for key, value in SIZES.items() if key in fields}
    counts = [3] if "head_dim" in fields or "num_heads" not in fields else [2, 11, 1]
    problems = {}
    for count in counts:
        values = sizes | ({"num_heads": count} if "num_heads" in fields else {}) | options
        try:
            return build_attention(kind, values)
        except Exception as error:
            problems[f"{values}"] = error
    said = "; ".join(f"with {values}: {type(error).__name__}: {error}" for values, error in problems.items())
    raise AssertionError(f"{kind!r} cannot be built {said}") from error_of(problems)


def error_of(problems: dict[str, Exception]) -> Exception:
    """The last one, for its traceback."""
    return list(problems.values())[-1]


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_close(actual: Tensor, expected: Tensor, what: str, tolerance: float = TIGHT) -> None:
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} is not {tuple(expected.shape)}"
    for name, tensor in (("result", actual), ("expected", expected)):
        wrong = (~tensor.isfinite()).nonzero().tolist()
        assert not wrong, f"{what}: {len(wrong)} numbers of the {name} are NaN or infinite, first at {wrong[:1]}"
    if not actual.numel():
        return
    error, allowed = (actual - expected).abs().max().item(), tolerance * max(1.0, expected.abs().max().item())
    assert error <= allowed, f"{what}: differs by {error:.3g}, more than {allowed:.3g}"


def streams(attention: Attention) -> bool:
    """Whether there is a streaming form: a token that depends on later ones can never be answered for good."""
    return attention.traits.causal


def stream(attention: Attention, x_BTD: Tensor, cuts: list[int], capacity: int) -> Tensor:
    """extend over chunks of the given lengths, from an empty state."""
    state = attention.init_state(len(x_BTD), capacity)
    outputs = []
    for chunk in x_BTD.split(cuts, dim=1):
        out, state = attention.extend(chunk, state)
        outputs.append(out)
    return torch.cat(outputs, dim=1)


def gradients(attention: Attention, out: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Gradients of a fixed random functional of `out`, for the input and every parameter that is trained."""
    wanted = {"input": x, **{name: p for name, p in attention.named_parameters() if p.requires_grad}}
    assert out.requires_grad, "the output has no gradient: is it detached, or computed under torch.no_grad()?"
    total = (out * inputs(*out.shape, seed=7)).sum()
    grads = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    unused = [name for name, grad in zip(wanted, grads, strict=True) if grad is None]
    assert not unused, (
        f"{', '.join(unused)}: no part in the output. Use it in this form too (is it detached?), remove it, or keep "
        "what is not trained as a buffer or with requires_grad=False"
    )
    return dict(zip(wanted, grads, strict=True))


def check_reference(build: Build) -> None:
    """forward == reference in float64, outputs and gradients of input and parameters."""
    attention, x = build(), inputs(BATCH, TOKENS, MODEL_DIM).requires_grad_()
    actual, expected = attention(x), attention.reference(x)
    assert actual.shape == x.shape, f"forward returns shape {tuple(actual.shape)} for an input of {tuple(x.shape)}"
    assert_close(actual, expected, "forward against reference")
    expected_grads = gradients(attention, expected, x)
    for name, grad in gradients(attention, actual, x).items():
        assert_close(grad, expected_grads[name], f"gradient of {name}", tolerance=1e-9)


def check_by_hand(build: Build) -> None:
    """forward == the formula in numpy, which shares no code with it: a mistake in a part is in every form of a variant,
    `reference` included."""
    attention, x = build(), inputs(1, TOKENS, MODEL_DIM)
    kind = ATTENTION.name_of(type(attention))
    formula = BY_HAND.get(kind, type(attention).by_hand)
    assert formula is not None, (
        f"{type(attention).__name__} has no by_hand: write the formula once more in numpy, "
        "by_hand(config, weights, x_TD) -> y_TD, as attnzoo/attention/_template.py does"
    )
    weights = {name: tensor.detach().numpy().copy() for name, tensor in attention.state_dict().items()}
    with torch.no_grad():
        actual, x_TD = attention(x)[0], x[0].numpy().copy()
        with NoTorch():
            expected = formula(attention.config, weights, x_TD)
    assert_close(actual, torch.as_tensor(np.asarray(expected)), "forward against the formula by hand")


class NoTorch(TorchDispatchMode):
    """Refuses torch's operations: the formula by hand is to be written without the code that it checks."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"by_hand calls torch ({func}): write it in numpy, without the project's parts")


def check_low_precision(build: Build) -> None:
    """In bfloat16, forward is at most twice as far from the float64 reference as the bfloat16 reference is."""
    attention, x = build(), inputs(BATCH, TOKENS, MODEL_DIM)
    with torch.no_grad():
        half = build().to(torch.bfloat16)
        # Weights and inputs that bfloat16 can hold: the error measured is that of the arithmetic.
        for exact, rounded in zip(attention.parameters(), half.parameters(), strict=True):
            exact.copy_(rounded)
        x = x.bfloat16().double()
        exact_out = attention.reference(x)

        def error(out: Tensor) -> float:
            return (out.double() - exact_out).square().mean().sqrt().item()

        ours, theirs = error(half(x.bfloat16())), error(half.reference(x.bfloat16()))
    assert ours <= 2 * theirs, f"bfloat16 error {ours:.3g} is more than twice the reference's {theirs:.3g}"


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


def check_causality(build: Build) -> None:
    """Changing token t changes no output before t, exactly 0.0, and does change the output at t."""
    attention, x = build(), inputs(BATCH, TOKENS, MODEL_DIM)
    if not attention.traits.causal:
        return
    with torch.no_grad():
        base = attention(x)
        for t in range(TOKENS):
            changed = x.clone()
            changed[:, t] += 1.0
            difference = (attention(changed) - base).abs().amax(dim=(0, 2))
            assert difference[:t].sum() == 0.0, f"token {t} changes outputs before it: {difference[:t].tolist()}"
            assert difference[t] > 0.0, f"token {t} does not change its own output"


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


def check_packing(build: Build) -> None:
    """Documents packed in rows equal the documents alone, outputs and gradients; one that crosses a row's end starts
    anew. Left- and right-padded rows equal the single runs."""
    attention = build()
    if not attention.traits.varlen:
        return
    x = inputs(BATCH, TOKENS, MODEL_DIM).requires_grad_()
    edges = torch.tensor([0, 3, 4, 9, 15, BATCH * TOKENS])
    packed = attention(x, document_starts(edges, BATCH, TOKENS))
    assert_close(packed, attention.reference(x, document_starts(edges, BATCH, TOKENS)), "packed against reference")
    pieces = [(0, 0, 3), (0, 3, 4), (0, 4, 9), (0, 9, 13), (1, 0, 2), (1, 2, 13)]
    alone = torch.cat([attention(x[row : row + 1, first:end])[0] for row, first, end in pieces])
    assert_close(packed.flatten(0, 1), alone, "packed documents")
    expected = gradients(attention, alone.view_as(packed), x)
    for name, grad in gradients(attention, packed, x).items():
        assert_close(grad, expected[name], f"gradient of {name} of packed documents", tolerance=1e-9)
    lengths = torch.tensor([5, TOKENS])
    with torch.no_grad():
        for side, kept in (("right", slice(0, 5)), ("left", slice(TOKENS - 5, None))):
            out = attention(x, padding_starts(lengths, TOKENS, side))
            assert_close(out[0, kept], attention(x[:1, kept])[0], f"{side}-padded row")
            assert_close(out[1], attention(x[1:])[0], f"unpadded row beside a {side}-padded one")


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


def check_gradients(build: Build) -> None:
    """gradcheck of forward and of extend over two chunks, and streamed parameter gradients == forward's."""
    attention = build()
    x = inputs(1, 5, MODEL_DIM).requires_grad_()
    check_differences(attention, x, "forward")
    if not streams(attention):
        return
    check_differences(lambda x: stream(attention, x, [2, 1, 2], 5), x, "extend over chunks of 2, 1 and 2 tokens")
    expected = gradients(attention, attention(x), x)
    for name, grad in gradients(attention, stream(attention, x, [2, 1, 2], 5), x).items():
        assert_close(grad, expected[name], f"gradient of {name} through extend", tolerance=1e-9)


def check_differences(call: Callable[[Tensor], Tensor], x: Tensor, form: str) -> None:
    """gradcheck, its error in words."""
    try:
        torch.autograd.gradcheck(call, (x,), fast_mode=True)
    except GradcheckError as error:
        raise AssertionError(f"{form}: the gradient is not that of small differences. {error}") from None


def check_shift(build: Build) -> None:
    """Adding n to all logical positions changes nothing, and costs no precision in bfloat16 either."""
    attention = build()
    if not (isinstance(attention, ComposedAttention) and isinstance(attention.mixing, SoftmaxMixing)):
        return
    if not attention.traits.shift_invariant:
        return
    position, heads = attention.mixing.position, attention.mixing.heads
    q = inputs(BATCH, TOKENS, heads.num_heads, heads.head_dim)
    k = inputs(BATCH, TOKENS, heads.num_kv_heads, heads.head_dim, seed=2)
    v = inputs(BATCH, TOKENS, heads.num_kv_heads, heads.head_dim, seed=3)

    def run(shift: int, dtype: torch.dtype) -> Tensor:
        positions = torch.arange(TOKENS).expand(BATCH, TOKENS) + shift
        turned_q, turned_k = position.to(dtype).encode(q.to(dtype), k.to(dtype), positions, "auto")
        qkv = (turned_q.transpose(1, 2), turned_k.transpose(1, 2), v.to(dtype).transpose(1, 2))
        mask = CausalMask(query_positions_BT=positions, key_positions_BKS=positions[:, None])
        return position.attend(qkv, mask, "auto").double()

    with torch.no_grad():
        exact = run(0, torch.float64)
        assert_close(run(1009, torch.float64), exact, "positions shifted by 1009", tolerance=1e-9)
        near, far = ((run(shift, torch.bfloat16) - exact).square().mean().sqrt() for shift in (0, 1009))
    assert far <= 2 * near, f"bfloat16 error grows from {near:.3g} to {far:.3g} when positions are shifted by 1009"


def check_cost(build: Build) -> None:
    """Measured state bytes, for every dtype, growth and parameter count equal what `cost` and the traits say."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16) if streams(build()) else ():
        attention = build().to(dtype)
        for batch, capacity in ((1, 5), (3, 11)):
            measured = attention.init_state(batch, capacity).nbytes()
            claimed = attention.cost(batch, 1, capacity).state_bytes
            assert measured == claimed, (
                f"{dtype}: init_state({batch}, {capacity}) has {measured} bytes, cost says {claimed}"
            )
        with torch.no_grad():
            x = inputs(BATCH, 5, MODEL_DIM).to(dtype)
            _, state = attention.extend(x, attention.init_state(BATCH, 5))
        said, now = attention.cost(BATCH, 1, 5).state_bytes, state.nbytes()
        assert now == said, f"{dtype}: after 5 tokens within capacity the state has {now} bytes, cost says {said}"
    attention = build()
    has, said = sum(p.numel() for p in attention.parameters()), attention.cost(1, 1, 1).parameters
    assert said == has, f"cost says {said} parameters, and there are {has}"
    growing = [attention.cost(1, 1, context).state_bytes for context in (100, 200, 300)]
    steps = [growing[1] - growing[0], growing[2] - growing[1]]
    at = "bytes of state at 100, 200 and 300 tokens; change the one that is wrong"
    if attention.traits.growth in ("O(1)", "O(window)"):
        assert steps == [0, 0], f"traits say growth={attention.traits.growth!r}, and cost says {growing} {at}"
    if attention.traits.growth == "O(T)":
        assert steps[0] == steps[1] > 0, f"traits say growth='O(T)', and cost says {growing} {at}"
    tokens = SIZES["max_distance"]  # farther ones share a row of the table, which streaming multiplies once
    prefill, decode = (
        sum(attention.cost(1, chunk, t).flops for t in range(chunk, tokens + 1, chunk)) for chunk in (tokens, 1)
    )
    windowed_table = attention.traits.position == "table" and attention.traits.growth == "O(window)"
    if streams(attention) and attention.traits.position != "sinusoid" and not windowed_table:
        assert prefill == decode, (
            f"cost says {prefill} FLOPs for {tokens} tokens at once and {decode} one by one; both count the pairs of "
            "query and key that causality leaves, t keys for token t"
        )
    training, streaming = attention.cost(BATCH, tokens, tokens), attention.cost(BATCH, 1, tokens)
    out_bytes = BATCH * tokens * MODEL_DIM * 8
    call = f"cost({BATCH}, {tokens}, {tokens})"
    assert training.activation_bytes >= out_bytes, (
        f"{call}.activation_bytes={training.activation_bytes}, less than the output's own {out_bytes} bytes: it is "
        "what forward leaves for the backward pass, and plans are made from it"
    )
    assert training.workspace_bytes > 0, f"{call}.workspace_bytes=0: gradients of activations take memory"
    assert (streaming.activation_bytes, streaming.workspace_bytes) == (0, 0), (
        f"cost({BATCH}, 1, {tokens}) has activation_bytes or workspace_bytes: streaming keeps nothing for gradients"
    )


def check_storage(build: Build) -> None:
    """No tensor of a state is a view that keeps the buffers of a long chunk alive, with room for it and without."""
    if not streams(build()):
        return
    attention, x = build(), inputs(BATCH, 8 * TOKENS, MODEL_DIM)
    for counts_B in (None, torch.tensor([8 * TOKENS, 3])):
        for capacity in (8 * TOKENS, 2):
            with torch.no_grad():
                _, state = attention.extend(x, attention.init_state(BATCH, capacity), counts_B)
            for name, tensor in state.tensors().items():
                held = tensor.untyped_storage().nbytes()
                assert held <= tensor.nbytes, f"{name} of {tensor.nbytes} bytes keeps {held} alive"


def check_batch(build: Build) -> None:
    """A row's result does not depend on the rows beside it."""
    attention, x = build(), inputs(3, TOKENS, MODEL_DIM)
    with torch.no_grad():
        together = attention(x)
        for row in range(3):
            assert_close(together[row], attention(x[row : row + 1])[0], f"row {row} of a batch")


def check_refusals(build: Build) -> None:
    """What the traits rule out is refused by name, never computed as something else."""
    attention, x = build(), inputs(BATCH, TOKENS, MODEL_DIM)
    starts_BT = torch.zeros(BATCH, TOKENS, dtype=torch.int64)
    attempts: dict[str, Callable[[], object]] = {}
    if not streams(attention):
        trait = "causal=False"
        attempts["init_state(batch, capacity)"] = lambda: attention.init_state(BATCH, TOKENS)
        attempts["extend(x, state)"] = lambda: attention.extend(x, None)
    if not attention.traits.varlen:
        trait = "varlen=False"
        attempts["forward(x, starts_BT)"] = lambda: attention(x, starts_BT)
        attempts["reference(x, starts_BT)"] = lambda: attention.reference(x, starts_BT)
    for call, attempt in attempts.items():
        problem = refusal(attempt)
        assert problem is not None, (
            f"{call} returns something where the traits say {trait}: raise ValueError there, naming the class, or "
            "declare what it can do"
        )
        assert type(attention).__name__ in problem, f"the error of {call} does not name the class: {problem}"


def refusal(attempt: Callable[[], object]) -> str | None:
    """What a call's ValueError says; None: it raised nothing."""
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return None


def check_implementations(build: Build) -> None:
    """`impl` is one that the variant has, or an error; those it has are the same function."""
    attention, x = build(), inputs(BATCH, TOKENS, MODEL_DIM)
    has = [impl for impl in ("torch", "reference", "triton") if impl in attention.implementations]
    assert "torch" in has, f"implementations={list(attention.implementations)} lacks 'torch', plain code on any device"
    for impl in {"torch", "reference", "triton", "no such"} - set(has):
        problem = refusal(lambda impl=impl: setattr(attention, "impl", impl))  # type: ignore[misc]
        assert problem is not None, f"impl={impl!r} is accepted, and implementations={has} does not have it"
        assert impl in problem, f"the error of impl={impl!r} does not name it: {problem}"
    with torch.no_grad():
        for impl in has[:2]:  # kernels compute in float32: test_triton has them
            attention.impl = impl  # type: ignore[assignment]
            assert_close(attention(x), build()(x), f"impl={impl!r} against 'auto'")


def check_empty(build: Build) -> None:
    """No tokens, and no sequences: an empty output and the state as it was, or a ValueError; never another error."""
    attention = build()
    for shape in ((BATCH, 0, MODEL_DIM), (0, TOKENS, MODEL_DIM), (0, 0, MODEL_DIM)):
        x = torch.zeros(*shape, dtype=torch.float64)
        calls: dict[str, Callable[[], Tensor]] = {"forward": lambda x=x: attention(x)}  # type: ignore[misc]
        calls["reference"] = lambda x=x: attention.reference(x)  # type: ignore[misc]
        if streams(attention):
            state = attention.init_state(shape[0], TOKENS)
            before = {name: tensor.clone() for name, tensor in state.tensors().items()}
            calls["extend"] = lambda x=x, state=state: attention.extend(x, state)[0]  # type: ignore[misc]
        for form, call in calls.items():
            try:
                with torch.no_grad():
                    out = call()
            except ValueError:
                continue
            except Exception as error:
                raise AssertionError(
                    f"{form} of an input of shape {list(shape)} ends in {type(error).__name__} ({error}); return an "
                    "empty output, or raise ValueError"
                ) from error
            assert out.shape == x.shape, f"{form} of {list(shape)} returns {list(out.shape)}"
            if form == "extend":
                _, after = attention.extend(x, attention.init_state(shape[0], TOKENS))
                for name, tensor in after.tensors().items():
                    assert torch.equal(tensor, before[name]), f"{name} of the state changes when no token comes"


def check_defaults(build: Build) -> None:
    """The variant can be built as a stranger would: with its defaults, and with one head, an odd number and many; fresh
    parameters are finite and make a finite output."""
    cls = type(build())
    kind, fields = ATTENTION.name_of(cls), {field.name for field in dataclasses.fields(cls.Config)}
    tried: list[dict[str, Any]] = [{"model_dim": 64}, {"model_dim": 96}]
    if "num_heads" in fields:
        tried += [{"model_dim": 4 * heads, "num_heads": heads} for heads in (1, 3, 7, 16)]
    for values in tried:
        what = f"{kind} with {', '.join(f'{key}={value}' for key, value in values.items())} and else its defaults"
        try:
            attention = build_attention(kind, values)
        except Exception as error:
            raise AssertionError(f"{what} cannot be built: {type(error).__name__}: {error}") from error
        x = inputs(BATCH, TOKENS, values["model_dim"]).float()
        for step in ("built", "reset_parameters"):
            for name, tensor in attention.named_parameters():
                assert tensor.isfinite().all(), f"{what}: {name} is not finite once {step}"
            with torch.no_grad():
                assert_close(attention(x), attention.reference(x), f"{what}, {step}", tolerance=1e-4)
            attention.reset_parameters(0.02, 0.01)


ITEMS: dict[str, Callable[[Build], None]] = {
    "defaults": check_defaults,
    "reference": check_reference,
    "by_hand": check_by_hand,
    "state": check_state,
    "low_precision": check_low_precision,
    "partitions": check_partitions,
    "saved_state": check_saved_state,
    "causality": check_causality,
    "unequal_batch": check_unequal_batch,
    "empty_chunk": check_empty_chunk_keeps_state,
    "packing": check_packing,
    "rows": check_rows,
    "gradients": check_gradients,
    "shift": check_shift,
    "cost": check_cost,
    "storage": check_storage,
    "batch": check_batch,
    "refusals": check_refusals,
    "implementations": check_implementations,
    "empty": check_empty,
    "served": check_served,
}


def verify_contract(build: Build) -> None:
    """Raises AssertionError at the first promise that the variant made by `build` does not keep."""
    for check in ITEMS.values():
        check(build)
