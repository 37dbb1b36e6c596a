"""What a query sees: every mask that the traits name, a context in place of the sequence, and nothing at all."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnzoo.attention import ATTENTION, Attention, StreamingAttention
from attnzoo.attention.composed import ParallelComposition
from attnzoo.ops.common.masks import Mask, padding_keys
from attnzoo.ops.common.step_inputs import StepInputs
from tests.contract.by_hand import BY_HAND
from tests.contract.cases import BATCH, MODEL_DIM, TOKENS, Build, assert_close, gradients, inputs, stream

CONTEXT = 7
"""Tokens of a context, fewer than `TOKENS`; and `LONG`, more."""
LONG = 17
LENGTHS = torch.tensor([5, TOKENS])
PREFIX = torch.tensor([4, 9])


def random_pairs(*shape: int, seed: int = 5) -> Tensor:
    """Two of three pairs, and always the first key."""
    pairs = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 2 / 3
    pairs[..., 0] = True
    return pairs


def masks_of(attention: Attention) -> dict[str, Mask]:
    """Every mask that the traits name, over TOKENS tokens."""
    right, left = (padding_keys(LENGTHS, TOKENS, side) for side in ("right", "left"))
    pairs = random_pairs(BATCH, TOKENS, TOKENS)
    masks = {
        "full": Mask.full(),
        "full, right-padded": Mask.full(right),
        "full, left-padded": Mask.full(left),
        "full, pairs": Mask.full(pairs=pairs),
        "causal, right-padded": Mask(keys_BS=right),
        "causal, pairs": Mask(pairs=pairs),
        "prefix": Mask(prefix_B=PREFIX),
        "prefix, padded": Mask(prefix_B=PREFIX, keys_BS=right),
        "nothing": Mask.full(torch.tensor([[False], [True]]).expand(BATCH, TOKENS)),
    }
    heads = getattr(attention.config, "num_heads", None)
    if heads is not None:
        masks["full, pairs of heads"] = Mask.full(pairs=random_pairs(BATCH, heads, TOKENS, TOKENS))
    return {name: mask for name, mask in masks.items() if mask.uses <= attention.traits.masks}


def check_masks(build: Build) -> None:
    """Under every mask that the traits name: forward == reference, outputs and gradients, and the formula by hand."""
    attention, x = build(), inputs(BATCH, TOKENS, MODEL_DIM).requires_grad_()
    for name, mask in masks_of(attention).items():
        same_as_reference(attention, x, f"mask {name!r}", mask=mask)
        same_as_by_hand(attention, x, f"mask {name!r}", mask)


def same_as_reference(attention: Attention, x: Tensor, what: str, **given: Any) -> None:
    """forward == reference under what is given, outputs and gradients."""
    actual, expected = attention(x, **given), attention.reference(x, **given)
    assert_close(actual, expected, f"{what}: forward against reference")
    # The sequence and its masks may leave parameters without a part, which `gradients` would refuse.
    wanted = [x, *(p for p in attention.parameters() if p.requires_grad)]
    weights = inputs(*actual.shape, seed=7)
    found, right = (
        torch.autograd.grad((out * weights).sum(), wanted, allow_unused=True, materialize_grads=True)
        for out in (actual, expected)
    )
    for got, want in zip(found, right, strict=True):
        assert_close(got, want, f"{what}: a gradient", tolerance=1e-9)


def same_as_by_hand(attention: Any, x: Tensor, what: str, mask: Mask, context: Tensor | None = None) -> None:
    """forward == the formula in numpy, where it is in the tree's and nothing is convolved over gaps."""
    formula = BY_HAND.get(ATTENTION.name_of(type(attention)))
    if formula is None or (hasattr(attention.config, "conv_width") and mask.keys_BS is not None):
        return
    entries = TOKENS if context is None else context.shape[1]
    own = attention.mixing.mask if mask.causal and hasattr(attention.mixing, "mask") else mask
    seen_BKTS = (
        replace(mask, window=own.window, sinks=own.sinks).visible(TOKENS, entries, x.device).expand(BATCH, -1, -1, -1)
    )
    if seen_BKTS.shape[1] > 1:
        return
    weights = {name: tensor.detach().numpy() for name, tensor in attention.state_dict().items()}
    with torch.no_grad():
        actual = attention(x, mask=mask, **({} if context is None else {"context_BSD": context}))
        if mask.keys_BS is not None and context is None:  # tokens that do not exist count as zeros
            x = x.masked_fill(~mask.keys_BS[..., None], 0.0)
    for row in range(BATCH):
        read = None if context is None else context[row].detach().numpy()
        seen = functools.partial(lambda at, i, j: bool(at[i, j]), seen_BKTS[row, 0])
        expected = formula(attention.config, weights, x[row].detach().numpy(), read, seen)
        assert_close(actual[row], torch.as_tensor(expected), f"{what}: against the formula by hand, row {row}")


def check_ragged(build: Build) -> None:
    """Rows of a full mask, padded on either side with anything, NaN included, equal the single rows."""
    attention, x = build(), inputs(BATCH, TOKENS, MODEL_DIM)
    if not {"full", "keys"} <= attention.traits.masks:
        return
    with torch.no_grad():
        for side, kept in (("right", slice(0, 5)), ("left", slice(TOKENS - 5, None))):
            if side == "left" and not attention.traits.shift_invariant:
                continue  # the first token is at position 0, be it padding or not
            keys = padding_keys(LENGTHS, TOKENS, side)
            out = attention(x.masked_fill(~keys[..., None], float("nan")), mask=Mask.full(keys))
            alone = attention(x[:1, kept], mask=Mask.full())[0]
            assert_close(out[0, kept], alone, f"{side}-padded row of a full mask (NaN where nothing is)")
            assert_close(out[1], attention(x[1:], mask=Mask.full())[0], f"row beside a {side}-padded one")


def check_prefix(build: Build) -> None:
    """Under a prefix, tokens of it are as in a full mask over it alone, and later ones as under causality."""
    attention, x = build(), inputs(BATCH, TOKENS, MODEL_DIM)
    if "prefix" not in attention.traits.masks:
        return
    with torch.no_grad():
        out, causal = attention(x, mask=Mask(prefix_B=PREFIX)), attention(x)
        for row, prefix in enumerate(PREFIX.tolist()):
            assert_close(out[row, prefix:], causal[row, prefix:], f"tokens after a prefix of {prefix}")
            if getattr(attention.config, "window", None) is None:
                alone = attention(x[row : row + 1, :prefix], mask=Mask.full())[0]
                assert_close(out[row, :prefix], alone, f"tokens of a prefix of {prefix}")


def check_order(build: Build) -> None:
    """Under a full mask tokens may come in any order: permuted together with their positions, so are the outputs."""
    attention = build()
    if "full" not in attention.traits.masks or not isinstance(attention, ParallelComposition):
        return
    mixing = attention.mixing
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(3))
    qkv = attention.projection(inputs(BATCH, TOKENS, MODEL_DIM))
    position = getattr(mixing, "position", None)

    def run(order: Tensor) -> Tensor:
        if position is None:
            return mixing(tuple(x[:, order] for x in qkv), Mask.full(), "auto")
        q, k = position.encode(qkv[0][:, order], qkv[1][:, order], StepInputs(order[None]), "auto")
        where_BT = order.expand(BATCH, TOKENS)
        mask = Mask(causal=False, query_positions_BT=where_BT, key_positions_BKS=where_BT[:, None])
        return position.attend((q.transpose(1, 2), k.transpose(1, 2), qkv[2][:, order].transpose(1, 2)), mask, "auto")

    with torch.no_grad():
        plain = mixing(qkv, Mask.full(), "auto")
        assert_close(run(order), plain[:, :, order], "permuted tokens of a full mask")


def check_nothing_seen(build: Build) -> None:
    """A row of whose keys none exists is zeros before the output map, and no gradient leaves it; beside it all is as
    it was."""
    attention, x = build(), inputs(BATCH, TOKENS, MODEL_DIM).requires_grad_()
    if not {"full", "keys"} <= attention.traits.masks or not isinstance(attention, ParallelComposition):
        return
    for impl in ("reference", "torch"):
        attention.impl = impl  # type: ignore[assignment]
        nothing = Mask.full(torch.tensor([[False], [True]]).expand(BATCH, TOKENS))
        out = attention(x, mask=nothing)
        heads = attention.projection.heads
        empty = attention.projection.merge(inputs(1, heads.num_heads, TOKENS, heads.head_dim) * 0.0)[0]
        assert_close(out[0], empty, f"{impl}: a row without a key")
        assert_close(out[1], attention(x[1:], mask=Mask.full())[0], f"{impl}: the row beside it")
        (grad,) = torch.autograd.grad(out[0].sum(), x)
        assert not grad.any(), f"{impl}: a row without a key gives x a gradient (or NaN) through what it does not see"


def check_context(build: Build) -> None:
    """Keys and values of a context, shorter and longer than x: forward == reference and the formula by hand; ragged on
    both sides the rows equal the single ones; x as its own context is a full mask."""
    attention, x = build(), inputs(BATCH, TOKENS, MODEL_DIM).requires_grad_()
    if not attention.traits.context:
        return
    for entries in (CONTEXT, TOKENS, LONG, 1):
        context = inputs(BATCH, entries, MODEL_DIM, seed=4).requires_grad_()
        what = f"context of {entries} tokens"
        same_as_reference(attention, x, what, context_BSD=context)
        same_as_by_hand(attention, x, what, Mask.full(), context)
        out = attention(x, context_BSD=context)
        for name, grad in gradients(attention, out, context).items():
            assert grad.any() or entries == 1, f"{what}: {name} has no part in the output"
    with torch.no_grad():
        assert_close(attention(x, context_BSD=x), attention(x, mask=Mask.full()), "x as its own context")
        lengths = torch.tensor([3, CONTEXT])
        context = inputs(BATCH, CONTEXT, MODEL_DIM, seed=4)
        sides = {"right": slice(0, 3), "left": slice(CONTEXT - 3, None)}
        if attention.traits.position != "none":
            del sides["left"]  # the first token of a context is at position 0, be it padding or not
        for side, kept in sides.items():
            keys = padding_keys(lengths, CONTEXT, side)
            filled = context.masked_fill(~keys[..., None], float("nan"))
            ragged = attention(x, context_BSD=filled, mask=Mask.full(keys))
            if isinstance(attention, StreamingAttention):
                held, _ = attention.extend(x, attention.init_context(filled, keys))
                assert_close(held, ragged, f"{side}-padded context with NaN where nothing is, in a state")
            alone = attention(x[:1, :6], context_BSD=context[:1, kept])[0]
            assert_close(ragged[0, :6], alone, f"6 queries of a {side}-padded context of 3 tokens")
            assert_close(ragged[1], attention(x[1:], context_BSD=context[1:])[0], f"beside a {side}-padded context")


def check_context_state(build: Build) -> None:
    """A context held in a state equals the context in parallel, over any partition, padded, joined with another, and
    for rows taken from it."""
    attention, x = build(), inputs(BATCH, TOKENS, MODEL_DIM)
    if not attention.traits.context or not isinstance(attention, StreamingAttention):
        return
    context = inputs(BATCH, CONTEXT, MODEL_DIM, seed=4)
    keys = padding_keys(torch.tensor([3, CONTEXT]), CONTEXT, "left")
    with torch.no_grad():
        for what, exist in (("whole", None), ("padded", keys)):
            expected = attention(x, context_BSD=context, mask=Mask.full(exist))
            for cuts in ([1] * TOKENS, [TOKENS], [4, 1, 8]):
                out = stream(attention, x, cuts, 0, lambda exist=exist: attention.init_context(context, exist))  # type: ignore[misc]
                assert_close(out, expected, f"{what} context in a state, extend over {cuts}")
        long = inputs(1, LONG, MODEL_DIM, seed=6)
        state = attention.init_context(context, keys).joined(attention.init_context(long))
        rows = torch.cat([x, x[:1] + 1.0])
        expected = torch.cat([expected, attention(rows[2:], context_BSD=long)])
        out, state = attention.extend(rows[:, :5], state, torch.tensor([5, 0, 2]))
        assert_close(out[2, :2], expected[2, :2], "a state joined with one of a longer context")
        out, _ = attention.extend(rows[1:2, :5], state.keep_rows([1]))
        assert_close(out[0], expected[1, :5], "a row that waited, taken out of a state")


ITEMS: dict[str, Callable[[Build], None]] = {
    "masks": check_masks,
    "ragged": check_ragged,
    "prefix": check_prefix,
    "order": check_order,
    "nothing_seen": check_nothing_seen,
    "context": check_context,
    "context_state": check_context_state,
}
"""All items of what is seen."""
