"""The forms of a variant are one function: parallel, by the definition, by hand, in low precision, backwards."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError
from torch.utils._python_dispatch import TorchDispatchMode

from attnzoo.attention import ATTENTION, build_attention
from attnzoo.attention.composed import ComposedAttention
from attnzoo.attention.forward_only import ForwardOnly
from attnzoo.attention.parts import SoftmaxMixing
from attnzoo.ops.common.masks import Mask, document_starts, padding_starts
from attnzoo.ops.common.step_inputs import StepInputs
from tests.contract.by_hand import BY_HAND
from tests.contract.cases import (
    BATCH,
    MODEL_DIM,
    TOKENS,
    Build,
    assert_close,
    gradients,
    inputs,
    stream,
    streams,
)


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
    if formula is None and isinstance(attention, ForwardOnly):
        check_own_definition(attention, x)
        return
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


def check_own_definition(attention: ForwardOnly, x: Tensor) -> None:
    """A plain module without a formula by hand is defined by its forward, so that nothing can be compared with it. What
    is wrapped around it is no part of the definition: its own class, built anew with the options and given the weights
    by their names, makes of every prefix (of the whole, if it reads later tokens) what the variant makes of it."""
    options = {field.name: getattr(attention.config, field.name) for field in dataclasses.fields(attention.config)}
    module = attention.written(**options).double()
    module.load_state_dict({name.removeprefix("module."): value for name, value in attention.state_dict().items()})
    usual = {"context": None, "mask": Mask() if attention.traits.causal else Mask.full()}
    given = {name: value for name, value in usual.items() if name in attention.takes}
    with torch.no_grad():
        out, lengths = attention(x), range(1, TOKENS + 1) if attention.traits.causal else [TOKENS]
        for tokens in lengths:
            alone = module(x[:, :tokens], **given)
            assert_close(out[:, tokens - 1], alone[:, -1], f"token {tokens - 1} against {options} built anew")


class NoTorch(TorchDispatchMode):
    """Refuses torch's operations: the formula by hand is to be written without the code that it checks."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"by_hand calls torch ({func}): write it in numpy, without the project's parts")


def check_low_precision(build: Build) -> None:
    """In bfloat16, forward is at most twice as far from the float64 reference as the bfloat16 reference is. The
    reference of a plain module is exact, and its forward may be off by a tenth: some 25 roundings of bfloat16."""
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
        if isinstance(attention, ForwardOnly):
            theirs = 0.05 * exact_out.square().mean().sqrt().item()
    assert ours <= 2 * theirs, f"bfloat16 error {ours:.3g} is more than twice the reference's {theirs:.3g}"


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


def check_packing(build: Build) -> None:
    """Documents packed in rows equal the documents alone, outputs and gradients; one that crosses a row's end starts
    anew. Left- and right-padded rows equal the single runs."""
    attention = build()
    if not attention.traits.varlen:
        return
    x = inputs(BATCH, TOKENS, MODEL_DIM).requires_grad_()
    edges = torch.tensor([0, 3, 4, 9, 15, BATCH * TOKENS])
    mask = Mask(starts_BT=document_starts(edges, BATCH, TOKENS))
    packed = attention(x, mask=mask)
    assert_close(packed, attention.reference(x, mask=mask), "packed against reference")
    pieces = [(0, 0, 3), (0, 3, 4), (0, 4, 9), (0, 9, 13), (1, 0, 2), (1, 2, 13)]
    alone = torch.cat([attention(x[row : row + 1, first:end])[0] for row, first, end in pieces])
    assert_close(packed.flatten(0, 1), alone, "packed documents")
    expected = gradients(attention, alone.view_as(packed), x)
    for name, grad in gradients(attention, packed, x).items():
        assert_close(grad, expected[name], f"gradient of {name} of packed documents", tolerance=1e-9)
    lengths = torch.tensor([5, TOKENS])
    with torch.no_grad():
        for side, kept in (("right", slice(0, 5)), ("left", slice(TOKENS - 5, None))):
            out = attention(x, mask=Mask(starts_BT=padding_starts(lengths, TOKENS, side)))
            assert_close(out[0, kept], attention(x[:1, kept])[0], f"{side}-padded row")
            assert_close(out[1], attention(x[1:])[0], f"unpadded row beside a {side}-padded one")


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
        turned_q, turned_k = position.to(dtype).encode(q.to(dtype), k.to(dtype), StepInputs(positions), "auto")
        qkv = (turned_q.transpose(1, 2), turned_k.transpose(1, 2), v.to(dtype).transpose(1, 2))
        mask = Mask(query_positions_BT=positions, key_positions_BKS=positions[:, None])
        return position.attend(qkv, mask, "auto").double()

    with torch.no_grad():
        exact = run(0, torch.float64)
        assert_close(run(1009, torch.float64), exact, "positions shifted by 1009", tolerance=1e-9)
        near, far = ((run(shift, torch.bfloat16) - exact).square().mean().sqrt() for shift in (0, 1009))
    assert far <= 2 * near, f"bfloat16 error grows from {near:.3g} to {far:.3g} when positions are shifted by 1009"


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
