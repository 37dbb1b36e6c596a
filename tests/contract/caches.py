"""What every cache policy must keep; the checks run for every policy of the registry and every variant with keys."""

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo.attention import ATTENTION, Attention
from attnzoo.attention.parts import SoftmaxMixing
from attnzoo.kvcache import CachePolicy, build_cache, load_state, save_state
from attnzoo.models import DecoderConfig, DecoderLM
from attnzoo.models.decoder_lm import DecoderState
from tests.contract.cases import MODEL_DIM as CASE_DIM
from tests.contract.cases import SIZES, TIGHT, assert_close

VARIANTS: dict[str, dict[str, Any]] = {
    "mha": {"kind": "mha", "num_heads": 3, "head_dim": 6},
    "gqa": {"kind": "mha", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6},
    "rmha": {"kind": "rmha", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "max_distance": 9},
    "sinusoid": {"kind": "rmha", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "position": "sinusoid"},
    "mdha": {"kind": "mdha", "num_heads": 3, "head_dim": 6},
    "rcmha": {"kind": "rcmha", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "max_distance": 9},
}

POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "streaming": ("streaming", {"keep_ratio": 0.5, "min_tokens": 0, "sinks": 2}),
    "random_tokens": ("random_tokens", {"keep_ratio": 0.5, "min_tokens": 0, "sinks": 1, "seed": 3}),
    "snapkv": ("snapkv", {"keep_ratio": 0.5, "min_tokens": 0, "window": 3, "pool": 3}),
    "d2o": ("d2o", {"keep_ratio": 0.5, "min_tokens": 0, "sinks": 2}),
    "d2o-uniform": ("d2o", {"keep_ratio": 0.5, "min_tokens": 0, "sinks": 2, "budget": "uniform"}),
    "d2o-official": ("d2o", {"keep_ratio": 0.5, "min_tokens": 0, "sinks": 2, "flavor": "official"}),
    "d2o-merge_counts": ("d2o", {"keep_ratio": 0.5, "min_tokens": 0, "sinks": 2, "merge_counts": True, "per": "layer"}),
    "think": ("think", {"channel_ratio": 0.5, "window": 3}),
    "think-greedy": ("think", {"channel_ratio": 0.5, "window": 3, "score": "greedy"}),
    "think-values": ("think", {"channel_ratio": 0.7, "value_channel_ratio": 0.5, "window": 3}),
    "think-repack_every": ("think", {"channel_ratio": 0.5, "window": 3, "repack_every": 2}),
    "think-output": ("think", {"channel_ratio": 0.7, "value_channel_ratio": 0.5, "window": 3, "value_score": "output"}),
    "think-recomputed": (
        "think",
        {"channel_ratio": 0.5, "value_channel_ratio": 0.5, "window": 3, "repack_every": 2, "mask": "recomputed"},
    ),
    "random_channels": ("random_channels", {"channel_ratio": 0.5, "window": 3}),
    "d2o+think": ("d2o+think", {"keep_ratio": 0.6, "min_tokens": 0, "sinks": 2, "window": 3}),
    "d2o+think-merge_counts": (
        "d2o+think",
        {"keep_ratio": 0.6, "min_tokens": 0, "sinks": 2, "window": 3, "merge_counts": True, "value_channel_ratio": 0.5},
    ),
}
"""Options that lose something within a dozen tokens: without `min_tokens` a page would stay."""

LOSSLESS: dict[str, list[dict[str, Any]]] = {
    "full": [{}],
    "streaming": [{"keep_ratio": 1.0}, {"max_tokens": 40}],
    "random_tokens": [{"keep_ratio": 1.0}, {"max_tokens": 40}],
    "snapkv": [{"keep_ratio": 1.0}, {"max_tokens": 40}],
    "d2o": [{"keep_ratio": 1.0}, {"max_tokens": 40}, {"max_tokens": 40, "merge_counts": True, "prefill": "stream"}],
    "think": [{"channel_ratio": 1.0}],
    "random_channels": [{"channel_ratio": 1.0}],
    "d2o+think": [{"max_tokens": 80, "channel_ratio": 1.0}, {"keep_ratio": 1.0, "channel_ratio": 1.0}],
}
"""Options that keep everything, of every policy."""

LAYERS, MODEL_DIM = 4, 14


def layers_of(name: str) -> int:
    """As few as there is something to decide over: the official budgets leave three layers whole, D2O's own ones share
    between layers, other policies do the same in every layer."""
    return LAYERS if "official" in name else 3 if name.startswith("d2o") else 2


def build_model(variant: str, seed: int = 0, layers: int = LAYERS) -> DecoderLM:
    """Random parameters everywhere: zero tables would hide mistakes."""
    config = DecoderConfig(vocab_size=29, model_dim=MODEL_DIM, num_layers=layers, attention=VARIANTS[variant])
    model = DecoderLM(config).double().eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return model.requires_grad_(False)


def policy_of(name: str, **changes: Any) -> CachePolicy:
    kind, options = POLICIES[name]
    return build_cache(kind, options | changes)


@functools.cache
def frozen_model(variant: str, layers: int = LAYERS, dtype: torch.dtype = torch.float64) -> DecoderLM:
    """One for all checks: nothing writes to it."""
    return build_model(variant, layers=layers).to(dtype)


@functools.cache
def full_run(
    variant: str, layers: int, dtype: torch.dtype, rows: int, total: int, read: int, chunk: int, step: int
) -> tuple[Tensor, DecoderState]:
    """Logits and state of the full cache, which all policies are compared with; see `run`."""
    return run(frozen_model(variant, layers, dtype), None, prompt(rows, total), read, chunk=chunk, step=step)


def prompt(batch: int, tokens: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 29, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def run(
    model: DecoderLM,
    policy: CachePolicy | None,
    tokens_BT: Tensor,
    read: int,
    *,
    lengths: Tensor | None = None,
    chunk: int | None = None,
    step: int = 1,
) -> tuple[Tensor, DecoderState]:
    """Prefill of `read` tokens in chunks, compress, then the rest `step` tokens at a time: logits of the rest."""
    batch = len(tokens_BT)
    state = model.init_state(batch, tokens_BT.shape[1], cache=policy)
    for part in tokens_BT[:, :read].split(chunk or read, dim=1):
        _, state = model.extend(part, state, lengths)
    state = model.compress(state)
    outputs = []
    for part in tokens_BT[:, read:].split(step, dim=1):
        logits, state = model.extend(part, state)
        outputs.append(logits)
    return torch.cat(outputs, dim=1), state


def check_unequal_batch(variant: str, name: str) -> None:
    """Three prompts of unequal lengths in one batch equal the three alone, one token at a time and several."""
    model, tokens, lengths = frozen_model(variant, layers_of(name)), prompt(3, 24), torch.tensor([14, 3, 9])
    rest = tokens[:, 14:]
    alone = [
        run(model, policy_of(name), torch.cat([tokens[row, :length], rest[row]])[None], length)[0]
        for row, length in enumerate(lengths.tolist())
    ]
    for step in (1, 3):
        state = model.init_state(3, 24, cache=policy_of(name))
        _, state = model.extend(tokens[:, :14], state, lengths)
        state, outputs = model.compress(state), []
        for part in rest.split(step, dim=1):
            logits, state = model.extend(part, state)
            outputs.append(logits)
        together = torch.cat(outputs, dim=1)
        for row, expected in enumerate(alone):
            assert_close(together[row : row + 1], expected, f"row {row} in steps of {step}", tolerance=1e-9)


def check_joined(variant: str, name: str) -> None:
    """Sequences that join a state and leave it, as a server's do, go on as alone, in no more memory than the longest
    needs."""
    model, tokens, lengths = frozen_model(variant, layers_of(name)), prompt(3, 24), [14, 3, 9]
    rest = tokens[:, 14:]
    alone = [
        run(model, policy_of(name), torch.cat([tokens[row, :length], rest[row]])[None], length)[0][0]
        for row, length in enumerate(lengths)
    ]
    state, running, done = None, [], [0, 0, 0]
    for event in (0, 1, 2, "leaves", "stays"):
        if isinstance(event, int):
            new = model.init_state(1, lengths[event], cache=policy_of(name))
            _, new = model.extend(tokens[event : event + 1, : lengths[event]], new)
            new = model.compress(new, joinable=True)
            state = new if state is None else state.joined(new)
            running.append(event)
        elif event == "leaves":
            state, running = state.keep_rows([2, 0]), [2, 0]
            held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in state.tensors().values()}
            assert sum(held.values()) == state.nbytes()
        logits, state = model.extend(torch.stack([rest[row, done[row]] for row in running])[:, None], state)
        for place, row in enumerate(running):
            assert_close(logits[place, 0], alone[row][done[row]], f"row {row} after {event}")
            done[row] += 1


def check_idle_rows(variant: str, name: str) -> None:
    """A sequence without a token in a chunk goes on as if the chunk had not been."""
    model, tokens = frozen_model(variant, layers_of(name)), prompt(2, 20)
    expected, _ = run(model, policy_of(name), tokens, 12)
    _, state = run(model, policy_of(name), tokens[:, :14], 12)
    idle = torch.cat([tokens[:1, 14:17], torch.full((1, 3), 7)])
    _, state = model.extend(idle, state, torch.tensor([3, 0]))
    logits, _ = model.extend(tokens[1:, 14:].expand(2, -1), state, torch.tensor([0, 6]))
    assert_close(logits[1:], expected[1:, 2:], "idle row", tolerance=1e-9)


def check_saved(variant: str, name: str) -> None:
    """A second run is the same bit for bit, and goes on so when it is saved while generating and loaded into a fresh
    state."""
    model, tokens = frozen_model(variant, layers_of(name)), prompt(2, 22)
    expected, _ = run(model, policy_of(name), tokens, 12)
    again, state = run(model, policy_of(name), tokens[:, :16], 12)
    assert torch.equal(again, expected[:, :4]), "two runs differ"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        save_state(state, path)
        state = load_state(model.init_state(2, 1, cache=policy_of(name)), path)
    outputs = []
    for t in range(16, 22):
        logits, state = model.extend(tokens[:, t : t + 1], state)
        outputs.append(logits)
    assert torch.equal(torch.cat(outputs, dim=1), expected[:, 4:]), "saved and loaded"


def check_bytes(variant: str, name: str) -> None:
    """Bytes fall below the full cache's, what one layer holds is what the policy says, before and after, and no tensor
    keeps a larger buffer alive."""
    model, tokens = frozen_model(variant, layers_of(name)), prompt(2, 65)
    changes = {"budget": "uniform"} if name.startswith("d2o") and "official" not in name else {}
    policy = policy_of(name, **changes)
    attention = model.layers()[0].attention
    (layer,) = attention.kv_layers()
    size = layer.size(2, torch.float64)
    state = model.init_state(2, 61, cache=policy)
    assert state.layers[1].mixing.nbytes() == policy.nbytes(size, 61)
    _, state = model.extend(tokens[:, :61], state)
    state = model.compress(state)
    for after in range(4):
        measured = [layer.mixing.nbytes() for layer in state.layers]
        if "official" in name:  # whole layers on either end
            measured = measured[2:3]
        claimed = policy.compressed_nbytes(size, 61, tokens=after)
        assert measured == [claimed] * len(measured), f"{measured} bytes a layer, the policy says {claimed}"
        if "think-" not in name and name not in ("think", "random_channels"):
            assert claimed < policy.nbytes(size, 61)
        for layer in state.layers:
            for tensor_name, x in layer.mixing.tensors().items():
                assert x.untyped_storage().nbytes() <= x.nbytes, f"{tensor_name} keeps a larger buffer alive"
        _, state = model.extend(tokens[:, 61 + after : 62 + after], state)


def check_positions(variant: str, name: str) -> None:
    """What is kept are the keys of the full cache at the positions they claim, on the channels they claim; no position
    twice; sinks and the newest are there."""
    model, tokens = frozen_model(variant, layers_of(name)), prompt(2, 26)
    changes = {"merge": False} if name.startswith("d2o") else {}
    policy = policy_of(name, **changes)
    # The first layer's keys depend on tokens and positions alone.
    _, state = run(model, policy, tokens, 20)
    _, full = full_run(variant, layers_of(name), torch.float64, 2, 26, 20, 20, 1)
    exact = full.layers[0].mixing.keys_BKSH
    found = kept_keys(state.layers[0].mixing, 26)
    for b, rows in enumerate(found):
        for k, entries in enumerate(rows):
            positions = [p for p, _, _ in entries]
            assert len(set(positions)) == len(positions), "a position is held twice"
            assert 25 in positions, "the newest token is not there"
            if "sinks" in POLICIES[name][1]:
                assert set(range(policy.config.sinks)) <= set(positions)
            for p, key, channels in entries:
                want = exact[b, k, p] if channels is None else exact[b, k, p][channels]
                if name == "think-recomputed":  # a channel that was lost before is zero for good
                    want = want.masked_fill(key == 0, 0.0)
                assert_close(key, want, f"key at position {p}")


def kept_keys(state: Any, length: int) -> list[list[list[tuple[int, Tensor, Tensor | None]]]]:
    """(position, key, its channels) of every entry, by sequence and kv head, read slot by slot."""
    out = []
    prefix = state.compressed()
    for b in range(len(state.starts_B)):
        rows = []
        for k in range(prefix.keys_BKSC.shape[1]):
            index = None if prefix.channels_BKC is None else prefix.channels_BKC[b, k]
            places = state.positions().expand(-1, prefix.keys_BKSC.shape[1], -1)[b, k].tolist()
            held = min(prefix.slots, int(state.held()[b]))
            entries = [(places[s], prefix.keys_BKSC[b, k, s], index) for s in range(held)]
            if not getattr(state, "decoding", False):
                for s in range(length - int(state.starts_B[b])):
                    entries.append((int(state.starts_B[b]) + s, state.tail.keys_BKSH[b, k, s], None))
            else:
                ring = state.ring.keys_BKRH
                count = ring.shape[2]
                # The oldest of the ring has moved into the prefix.
                for p in range(max(0, length - count + 1), length):
                    entries.append((p, ring[b, k, p % count], None))
            rows.append(entries)
        out.append(rows)
    return out


def check_stream(variant: str, name: str) -> None:
    """Compressed after every chunk, the largest state of the prefill is smaller, and generation still goes on."""
    model, tokens = frozen_model(variant, layers_of(name)), prompt(2, 60)
    sizes: dict[str, int] = {}
    for prefill in ("oneshot", "stream"):
        policy = policy_of(name, prefill=prefill)
        state, peak = model.init_state(2, 6, cache=policy), 0
        for part in tokens[:, :54].split(6, dim=1):
            _, state = model.extend(part, state)
            peak = max(peak, state.nbytes())
        sizes[prefill] = peak
    logits, _ = model.extend(tokens[:, 54:], model.compress(state))
    assert torch.isfinite(logits).all()
    assert sizes["stream"] < sizes["oneshot"], f"peaks {sizes}"


CHECKS = {
    "unequal_batch": check_unequal_batch,
    "joined": check_joined,
    "idle_rows": check_idle_rows,
    "saved": check_saved,
    "bytes": check_bytes,
    "positions": check_positions,
    "stream": check_stream,
}


def check_everything_kept(variant: str, kind: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """With nothing to lose, logits equal the full cache's bit for bit: prompts in chunks, then steps of one and two."""
    layers = layers_of(kind)
    model, tokens = frozen_model(variant, layers, dtype), prompt(3, 22)
    for chunk, step in ((14, 1), (5, 2)):
        expected, _ = full_run(variant, layers, dtype, 3, 22, 14, chunk, step)
        actual, state = run(model, build_cache(kind, options), tokens, 14, chunk=chunk, step=step)
        assert torch.equal(actual, expected), f"{kind} {options}: differs by {(actual - expected).abs().max():.3g}"
    assert dataclasses.is_dataclass(state)


def registered_model(kind: str, options: dict[str, Any], layers: int) -> DecoderLM:
    """A model of a registered variant, with random parameters."""
    names = {field.name for field in dataclasses.fields(ATTENTION.get(kind).Config)}
    sizes = {key: value for key, value in SIZES.items() if key in names - {"model_dim"}}
    if "num_heads" in names and "head_dim" not in names:
        sizes["num_heads"] = 2  # divides model_dim
    spec = {"kind": kind, **sizes, **options}
    model = DecoderLM(DecoderConfig(vocab_size=29, model_dim=CASE_DIM, num_layers=layers, attention=spec))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.double().eval().requires_grad_(False)


def refusal(attention: Attention, policy: CachePolicy) -> str | None:
    """What a variant must say where it cannot have a policy; None where it must work."""
    if attention.traits.growth == "O(1)":
        return "constant size and no keys to compress|a state of its own"
    if attention.traits.growth == "O(window)":
        return r"window=\d+ keeps a constant number of tokens|a state of its own"
    if not isinstance(getattr(attention, "mixing", None), SoftmaxMixing):
        return "keeps a state of its own"
    return "does not say its scores" if policy.needs - attention.mixing.position.says else None


def check_registered(kind: str, options: dict[str, Any]) -> None:
    """With every policy a variant works, in a batch as alone, or is refused with its reason before the first token."""
    models = {layers: registered_model(kind, options, layers) for layers in (2, 3, LAYERS)}
    # No token comes twice: where keys know nothing of positions, entries of one token tie, and rounding decides.
    generator = torch.Generator().manual_seed(3)
    tokens, lengths = (
        torch.stack([torch.randperm(29, generator=generator)[:17] for _ in range(2)]),
        torch.tensor([12, 9]),
    )
    for name in POLICIES:
        model, policy = models[layers_of(name)], policy_of(name)
        reason = refusal(model.layers()[0].attention, policy)
        if reason is not None:
            with pytest.raises(ValueError, match=reason):
                model.byte_model(policy)
            continue
        assert model.byte_model(policy).reading(12) > 0
        _, state = model.extend(tokens[:, :12], model.init_state(2, 12, cache=policy), lengths)
        logits, _ = model.extend(tokens[:, 12:], model.compress(state))
        alone, _ = run(model, policy_of(name), torch.cat([tokens[1:, :9], tokens[1:, 12:]], dim=1), 9)
        assert_close(logits[1:], alone, f"{kind} {options} with {name}", tolerance=1e-9)


__all__ = ["CHECKS", "LOSSLESS", "POLICIES", "TIGHT", "VARIANTS"]
