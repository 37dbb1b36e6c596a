"""What a variant says of itself is so: its cost, its storage, what it refuses, what it takes of nothing."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from attnzoo.attention import StreamingAttention
from attnzoo.ops.common.masks import Mask
from tests.contract.cases import BATCH, MODEL_DIM, SIZES, TOKENS, Build, assert_close, inputs, streams


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
    if attention.traits.streaming == "recomputed":
        again = sum(attention.cost(1, t, t).flops for t in range(1, tokens + 1))
        assert decode == again > prefill, (
            f"cost says {decode} FLOPs for {tokens} tokens one by one, and forward over every prefix takes {again}"
        )
    elif streams(attention) and attention.traits.position != "sinusoid" and not windowed_table:
        assert prefill == decode, (
            f"cost says {prefill} FLOPs for {tokens} tokens at once and {decode} one by one; both count the pairs of "
            "query and key that causality leaves, t keys for token t"
        )
    memory = attention.training_memory(BATCH, tokens)
    out_bytes = BATCH * tokens * MODEL_DIM * 8
    call = f"training_memory({BATCH}, {tokens})"
    assert memory.kept >= out_bytes, (
        f"{call}.kept={memory.kept}, less than the output's own {out_bytes} bytes: it is what forward leaves for the "
        "backward pass, and plans are made from it"
    )
    assert memory.workspace > 0, f"{call}.workspace={memory.workspace}: gradients of activations take memory"


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


def check_refusals(build: Build) -> None:
    """What the traits rule out is refused by name, never computed as something else."""
    attention, x = build(), inputs(BATCH, TOKENS, MODEL_DIM)
    traits, attempts = attention.traits, {}
    for name, mask in masks_of_each_field().items():
        if not mask.uses <= traits.masks:
            call = f"forward(x, mask=Mask with {name})"
            attempts[call] = functools.partial(attention, x, mask=mask)
            attempts[call.replace("forward", "reference")] = functools.partial(attention.reference, x, mask=mask)
    if not traits.context:
        attempts["forward(x, context_BSD=x)"] = functools.partial(attention, x, context_BSD=x)
        attempts["reference(x, context_BSD=x)"] = functools.partial(attention.reference, x, context_BSD=x)
        if isinstance(attention, StreamingAttention):
            attempts["init_context(x)"] = functools.partial(attention.init_context, x)
    if isinstance(attention, StreamingAttention):
        state = attention.init_state(BATCH, TOKENS)
        attempts["extend(one row, state of two)"] = functools.partial(attention.extend, x[:1], state)
        for counts in ([-1, 2], [2, TOKENS + 1]):
            attempts[f"extend(x, state, counts_B={counts})"] = functools.partial(
                attention.extend, x, state, torch.tensor(counts)
            )
    for name, mask in {"window": Mask(window=3), "positions": streaming_mask()}.items():
        attempts[f"forward(x, mask=Mask with {name})"] = functools.partial(attention, x, mask=mask)
    for call, attempt in attempts.items():
        problem = refusal(attempt)
        assert problem is not None, (
            f"{call} returns something that the traits do not promise ({traits}): raise ValueError there, naming the "
            "class (check_input does), or declare what it can do"
        )
        assert type(attention).__name__ in problem, f"the error of {call} does not name the class: {problem}"


def masks_of_each_field() -> dict[str, Mask]:
    """One mask for each field that traits name, beside causal ones."""
    return {
        "causal=False": Mask.full(),
        "prefix_B": Mask(prefix_B=torch.tensor([4, 2])),
        "starts_BT": Mask(starts_BT=torch.zeros(BATCH, TOKENS, dtype=torch.int64)),
        "keys_BS": Mask(keys_BS=torch.ones(BATCH, TOKENS, dtype=torch.bool)),
        "pairs": Mask(pairs=torch.ones(BATCH, TOKENS, TOKENS, dtype=torch.bool)),
    }


def streaming_mask() -> Mask:
    """A mask of the streaming form, which belongs to a state."""
    positions_BT = torch.arange(TOKENS).expand(BATCH, TOKENS)
    return Mask(query_positions_BT=positions_BT, key_positions_BKS=positions_BT[:, None])


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
