"""`attnzoo bench edits`: what reads and edits of attention cost, beside plain passes and transformers with a hook.

One decoder of SmolLM2-135M's heads with random weights, and transformers' Llama with the same weights. The edit is
visual attention redistribution (Kang et al. 2025, arXiv 2503.03321): heads that look at the image give it a part of
what their sinks have, in every layer from the third on. Times are the least CPU time of many turns, on a machine that
may have other work.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnzoo.attention.edits import EditRun, Edits, HeadFilter, Item, Mass, Move, Sinks, TokenLayout, Where
from attnzoo.checkpoint.huggingface_export import export_model
from attnzoo.cli import carry_out
from attnzoo.models import DecoderConfig, DecoderLM
from attnzoo.profiling.memory import peak_bytes
from attnzoo.report import Claim, Report
from scripts import arguments
from scripts.bench_attention import BUSY, take_turns

HEADS, KV_HEADS, MODEL_DIM, VOCABULARY = 9, 3, 576, 4096
SHARE, LEAST, CENTRED = 0.6, 0.2, 0.2
"""p, and the least weight and the least part on image tokens of an image-centric head."""
SINKS = Sinks((7, 300), 2.5)
SHORT = 16
"""Tokens of a prompt in which what an argument costs is not lost in the noise."""
MIB = 2**20

Call = Callable[..., Any]


def decoder(layers: int, positions: int) -> DecoderLM:
    """A random model, in float32."""
    attention = {"kind": "mha", "num_heads": HEADS, "num_kv_heads": KV_HEADS}
    config = DecoderConfig(
        vocab_size=VOCABULARY,
        model_dim=MODEL_DIM,
        num_layers=layers,
        mlp_dim=1536,
        max_positions=positions,
        attention=attention,
        init_std=0.05,
    )
    torch.manual_seed(0)
    return DecoderLM(config).eval().requires_grad_(False)


def layout(prompt: int) -> TokenLayout:
    """An image in the first half of the prompt."""
    return TokenLayout(prompt, {"image": (prompt // 16, prompt // 2)})


def redistribution() -> list[Item]:
    """The edit that is measured."""
    filtered = HeadFilter(of="image", min_mass=LEAST, min_share=CENTRED)
    return [Move(Where(layers="2:", keys=SINKS), "image", SHARE, filtered)]


def mass() -> list[Item]:
    """The read that is measured: every head's weight on the image and on the rest."""
    return [Mass(bins={"image": "image"})]


def runs(model: DecoderLM, items: list[Item], prompt: int, new: int, batch: int = 1) -> list[EditRun]:
    """A run for each sequence."""
    plan = model.plan_edits(Edits(*items), layout(prompt), new)
    return [EditRun(plan) for _ in range(batch)]


def peer_of(model: DecoderLM, attention: str) -> Any:
    """transformers' Llama with the model's weights; None where transformers is not installed."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        return None
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        export_model(Path(folder), model)
        theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32)
    return theirs.eval().requires_grad_(False)


def watch_sinks(theirs: Any) -> None:
    """Every layer's attention keeps which tokens so far are sinks, by the hidden states that enter the layer."""

    def before(layer: Any, given: tuple[Any, ...], _: Any) -> None:
        found_T = SINKS.found(given[0])[0]
        whole = len(found_T) > 1
        layer.self_attn.sinks_S = found_T if whole else torch.cat([layer.self_attn.sinks_S, found_T])

    for layer in theirs.model.layers:
        layer.register_forward_pre_hook(before, with_kwargs=True)


@contextmanager
def hooked(prompt: int) -> Iterator[None]:
    """transformers' eager attention with the redistribution written into it, as its authors do: on whole maps."""
    from transformers.models.llama import modeling_llama

    right = modeling_llama.eager_attention_forward
    first, last = layout(prompt).spans["image"]

    def eager(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = query @ key.transpose(2, 3) * scaling
        weights = (scores if mask is None else scores + mask[..., : key.shape[2]]).softmax(-1)
        if module.layer_idx >= 2:
            weights = redistributed(weights, module.sinks_S[: key.shape[2]], first, last)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    theirs: Any = modeling_llama
    theirs.eager_attention_forward = eager
    try:
        yield
    finally:
        theirs.eager_attention_forward = right


def redistributed(weights: Tensor, sinks_S: Tensor, first: int, last: int) -> Tensor:
    """The edit on weights_BNTS."""
    image_S = torch.zeros_like(sinks_S)
    image_S[first:last] = True
    receiving = (image_S & ~sinks_S).to(weights.dtype)
    on_image = (weights * image_S).sum(-1, keepdim=True)
    received = (weights * receiving).sum(-1, keepdim=True)
    active = (on_image >= LEAST) & (received >= CENTRED * on_image) & (received > 0)
    moved = SHARE * (weights * sinks_S).sum(-1, keepdim=True)
    new = weights * (1 - SHARE * sinks_S.to(weights.dtype)) + weights * receiving * moved / received.clamp_min(1e-20)
    return torch.where(active, new, weights)


def hooked_call(prompt: int, call: Call) -> Call:
    """The call with the redistribution in transformers' attention."""

    def run(*given: Any, **options: Any) -> Any:
        with hooked(prompt):
            return call(*given, **options)

    return run


def prefill(report: Report, layers: int, tokens: int, turns: int) -> dict[str, float]:
    """Milliseconds of a whole pass over a prompt, by contender; adds rows to the report, and how far edited logits are
    from those of the hook."""
    model = decoder(layers, tokens)
    prompt_1T = torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(1))
    contenders: dict[str, Call] = {
        "plain": lambda: model(prompt_1T),
        "plain, again": lambda: model(prompt_1T),
        "mass of every head": lambda: model(prompt_1T, edits=runs(model, mass(), tokens, 0)),
        "redistribution": lambda: model(prompt_1T, edits=runs(model, redistribution(), tokens, 0)),
    }
    theirs = peer_of(model, "eager")
    if theirs is not None:
        fused = peer_of(model, "sdpa")
        watched = peer_of(model, "eager")
        watch_sinks(watched)
        contenders |= {
            "transformers sdpa": lambda: fused(prompt_1T).logits,
            "transformers eager": lambda: theirs(prompt_1T).logits,
            "transformers eager, hook": hooked_call(tokens, lambda: watched(prompt_1T).logits),
        }
        plain, edited = contenders["plain"](), contenders["redistribution"]()
        hook = contenders["transformers eager, hook"]()
        report.rows.append(
            {
                "what": "logits",
                "T": tokens,
                "contender": "redistribution",
                "moves logits by": (edited - plain).abs().max().item(),
                "from the hook's": (edited - hook).abs().max().item(),
            }
        )
    return _timed(report, "prefill", tokens, contenders, turns)


def unused(report: Report, layers: int, turns: int) -> float:
    """Milliseconds that `edits` adds where no row has any: of a short prompt, since both passes run the same operations
    whatever the length, and one of a long prompt varies by more; adds rows to the report."""
    model = decoder(layers, SHORT)
    prompt_1T = torch.randint(VOCABULARY, (1, SHORT), generator=torch.Generator().manual_seed(1))
    contenders: dict[str, Call] = {
        "plain": lambda: model(prompt_1T),
        "plain, again": lambda: model(prompt_1T),
        "no edit for any row": lambda: model(prompt_1T, edits=[None]),
    }
    found = _timed(report, "prefill", SHORT, contenders, turns)
    return found["no edit for any row"] - found["plain"]


def decode(report: Report, layers: int, context: int, batch: int, turns: int) -> dict[str, float]:
    """Milliseconds of a decode step after prompts of `context` tokens, by contender; adds rows to the report."""
    model = decoder(layers, context + turns + 2)
    prompt_BT = torch.randint(VOCABULARY, (batch, context), generator=torch.Generator().manual_seed(1))
    token_B1 = prompt_BT[:, :1]

    def ours(items: list[Item] | None) -> Call:
        edits = None if items is None else runs(model, items, context, turns + 2, batch)
        held = [model.extend(prompt_BT, model.init_state(batch, context + turns + 2), edits=edits)[1]]

        def step() -> None:
            _, held[0] = model.extend(token_B1, held[0], edits=edits)

        return step

    contenders = {
        "plain": ours(None),
        "plain, again": ours(None),
        "mass of every head": ours(mass()),
        "redistribution": ours(redistribution()),
    }
    for name, attention in (
        ("transformers sdpa", "sdpa"),
        ("transformers eager", "eager"),
        ("transformers eager, hook", "eager"),
    ):
        theirs = peer_of(model, attention) if batch == 1 else None  # the hook is written for one sequence
        if theirs is None:
            break
        contenders[name] = _peer_step(theirs, prompt_BT, hook=name.endswith("hook"))
    return _timed(report, f"decode, {batch} sequences", context, contenders, turns)


def _peer_step(theirs: Any, prompt_1T: Tensor, hook: bool) -> Call:
    if hook:
        watch_sinks(theirs)
    from transformers import DynamicCache

    cache = DynamicCache(config=theirs.config)
    call = hooked_call(prompt_1T.shape[1], theirs) if hook else theirs
    call(prompt_1T, past_key_values=cache)

    def step() -> None:
        call(prompt_1T[:, :1], past_key_values=cache)

    return step


def memory(report: Report, tokens: int) -> float:
    """Peak bytes of a prompt with a mass read over those without; adds rows to the report."""
    model = decoder(2, tokens)
    prompt_1T = torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(1))
    peaks = {
        "plain": peak_bytes(lambda: model.hidden(prompt_1T)),
        "mass of every head": peak_bytes(lambda: model.hidden(prompt_1T, edits=runs(model, mass(), tokens, 0))),
    }
    for name, peak in peaks.items():
        report.rows.append({"what": "prefill, 2 layers", "T": tokens, "contender": name, "MiB": peak / MIB})
    return peaks["mass of every head"] / peaks["plain"]


def _timed(report: Report, what: str, tokens: int, contenders: dict[str, Call], turns: int) -> dict[str, float]:
    least = take_turns(contenders, turns, time.process_time, min)
    found = {name: seconds * 1e3 for name, seconds in least.items()}
    for name, milliseconds in found.items():
        row = {
            "what": what,
            "T": tokens,
            "contender": name,
            "ms": milliseconds,
            "x plain": milliseconds / found["plain"],
        }
        report.rows.append(row)
    return found


def run(options: argparse.Namespace) -> int:
    """Measures and prints a table; exit status 1 if a claim does not hold. Raises ValueError for wrong usage."""
    arguments.check_counts(options)
    torch.set_num_threads(options.threads)
    report = Report.start(command=options.command, quick=options.quick)
    if report.load_before > BUSY:
        print(f"load average {report.load_before} is above {BUSY}: timings may be unreliable", file=sys.stderr)
    layers, prompt, context = (3, 96, 128) if options.quick else (8, 1024, 4096)
    turns = 2 if options.quick else options.turns
    with torch.no_grad():
        first = prefill(report, layers, prompt, turns)
        added = unused(report, layers, 20 * turns)
        steps = {batch: decode(report, layers, context, batch, 5 * turns) for batch in (1, 4)}
        ratio = memory(report, context)
    report.claims += claims(first, added, steps, ratio, report.rows)
    report.print_table()
    if options.json:
        report.write(options.json)
    return report.exit_status()


def claims(
    first: dict[str, float],
    added: float,
    steps: dict[int, dict[str, float]],
    ratio: float,
    rows: list[dict[str, Any]],
) -> list[Claim]:
    """The claims about one run."""
    made = [
        Claim(
            name="prefill, no edit for any row: times plain",
            expected=1.005,
            measured=1 + added / first["plain"],
        ),
        Claim(
            name="prefill, redistribution: times plain", expected=1.2, measured=first["redistribution"] / first["plain"]
        ),
        *(
            Claim(
                name=f"decode of {batch}, redistribution: times plain",
                expected=1.1,
                measured=step["redistribution"] / step["plain"],
            )
            for batch, step in steps.items()
        ),
        Claim(name="mass read: times plain's memory", expected=2, measured=ratio),
    ]
    apart = [row["from the hook's"] for row in rows if "from the hook's" in row]
    return made + [Claim(name="edited logits: from the hook's", expected=1e-3, measured=x) for x in apart]


def main(words: list[str] | None = None) -> int:
    """Runs `attnzoo bench edits`; returns the exit status."""
    return carry_out("attnzoo bench edits", arguments.bench_edits, run, sys.argv[1:] if words is None else words)


if __name__ == "__main__":
    sys.exit(main())
