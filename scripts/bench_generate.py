"""`attnzoo bench generate`: prefill and decoding speed of a real model, against other engines."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attnzoo.checkpoint import export_model, find_checkpoint, load_model, load_tokenizer, open_checkpoint
from attnzoo.cli import carry_out
from attnzoo.models import build_shapes
from attnzoo.report import Claim, Report
from scripts import arguments
from serve.config import EngineConfig
from serve.engine import Engine
from serve.request import SamplingParams

BUSY = 0.75
"""A higher load average makes timings unreliable."""

Prompts = list[list[int]]
Timing = tuple[float, float]
"""(seconds to the first token of all sequences, seconds from there to the last token)."""
Contender = Callable[[Prompts], Timing]

OURS = "attnzoo"


@dataclass(frozen=True)
class Sizes:
    """prompt, new: tokens of each sequence. batches: numbers of sequences at a time. turns: of every engine."""

    prompt: int = 512
    new: int = 128
    batches: tuple[int, ...] = (1, 8)
    turns: int = 3


QUICK = Sizes(prompt=32, new=4, batches=(1, 2), turns=1)


def engine_contender(checkpoint: str, sizes: Sizes, dtype: str, compiled: bool) -> Contender:
    """attnzoo's engine in this process."""
    most = max(sizes.batches)
    config = EngineConfig(
        checkpoint=checkpoint,
        dtype=dtype,
        max_num_seqs=most,
        max_model_len=sizes.prompt + sizes.new,
        max_batched_tokens=most * sizes.prompt + most + 1,
        compile_decode=compiled,
    )
    engine = Engine(config)
    params = SamplingParams(max_tokens=sizes.new, ignore_eos=True)

    def run(prompts: Prompts) -> Timing:
        begin = time.perf_counter()
        for number, prompt in enumerate(prompts):
            engine.add_request(str(number), prompt, params)
        engine.step()
        first = time.perf_counter()
        while engine.has_work():
            engine.step()
        return first - begin, time.perf_counter() - first

    return run


def by_difference(generate: Callable[[Prompts, int], float], sizes: Sizes) -> Contender:
    """A contender from a function that times a whole generation: the time for one new token is the prefill's."""

    def run(prompts: Prompts) -> Timing:
        first = generate(prompts, 1)
        return first, generate(prompts, sizes.new) - first

    return run


def transformers_contender(directory: Path, sizes: Sizes) -> Contender | None:
    """transformers' `generate`; None if transformers is not installed."""
    try:
        from transformers import AutoModelForCausalLM
    except ModuleNotFoundError:
        print("transformers is not installed (pip install 'attnzoo[hf]'): left out", file=sys.stderr)
        return None
    # It reads a directory, because from a GGUF file transformers may keep weights quantised.
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()

    def generate(prompts: Prompts, new: int) -> float:
        ids = torch.tensor(prompts)
        begin = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        return time.perf_counter() - begin

    return by_difference(generate, sizes)


def peer_contender(python: Path, engine: str, directory: Path, options: list[str], sizes: Sizes) -> Contender | None:
    """An engine in another Python environment (scripts/peers_generate.py); None, with its last message on stderr, if it
    does not start."""
    command = [str(python), str(Path(__file__).with_name("peers_generate.py")), engine, str(directory), *options]
    for name, value in (("prompt", sizes.prompt), ("new", sizes.new), ("batch", max(sizes.batches))):
        command += [f"--{name}", str(value)]
    peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert peer.stdin is not None
    assert peer.stdout is not None
    ready = peer.stdout.readline()
    if not ready.startswith('{"ready"'):
        _, errors = peer.communicate()
        print(f"{engine}: left out: {errors.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    print(f"{engine} {json.loads(ready)['ready']}", file=sys.stderr)
    asked, answers = peer.stdin, peer.stdout

    def generate(prompts: Prompts, new: int) -> float:
        asked.write(json.dumps({"prompts": prompts, "new": new}) + "\n")
        asked.flush()
        return float(json.loads(answers.readline())["seconds"])

    return by_difference(generate, sizes)


def contenders(checkpoint: str, peers: Path | None, sizes: Sizes, directory: Path) -> dict[str, Contender]:
    """The available engines, by name."""
    path = find_checkpoint(checkpoint)
    export_model(directory, load_model(path, dtype=torch.bfloat16), tokenizer=load_tokenizer(path))
    found: dict[str, Contender | None] = {
        OURS: engine_contender(checkpoint, sizes, "bfloat16", compiled=True),
        f"{OURS}, not compiled": engine_contender(checkpoint, sizes, "bfloat16", compiled=False),
        "transformers": transformers_contender(directory, sizes),
    }
    if peers is not None:
        found["llama.cpp"] = peer_contender(peers, "llama.cpp", directory, ["--gguf", str(path)], sizes)
        exact = ["--dtype", "float32"]
        found["ctranslate2, float32"] = peer_contender(peers, "ctranslate2", directory, exact, sizes)
        found[f"{OURS}, float32"] = engine_contender(checkpoint, sizes, "float32", compiled=True)
    return {name: contender for name, contender in found.items() if contender is not None}


def read_rate() -> float:
    """Bytes per second at which all threads read a tensor larger than the CPU's caches; the best of seven tries."""
    data = torch.ones(128 << 20, dtype=torch.float32)
    best = float("inf")
    for _ in range(7):
        begin = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - begin)
    return data.nbytes / best


def measure(contenders: dict[str, Contender], sizes: Sizes, vocabulary: int) -> list[dict[str, Any]]:
    """Rows of tokens per second; the engines take turns."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for batch in sizes.batches:
        prompts = torch.randint(vocabulary, (batch, sizes.prompt), generator=generator).tolist()
        timings: dict[str, list[Timing]] = {name: [] for name in contenders}
        for run in contenders.values():
            run([prompt[:8] for prompt in prompts])
        for turn in range(sizes.turns):
            for name, run in contenders.items():
                timings[name].append(run(prompts))
                print(f"batch {batch}, turn {turn + 1} of {sizes.turns}: {name}", file=sys.stderr)
        for name, found in timings.items():
            prefill, decode = (min(timing[side] for timing in found) for side in (0, 1))
            rows.append(
                {
                    "batch": batch,
                    "contender": name,
                    "prefill tokens/s": round(batch * sizes.prompt / prefill, 1),
                    "decode tokens/s": round(batch * (sizes.new - 1) / decode, 1),
                    "ms/token": round(1000 * decode / (sizes.new - 1), 2),
                }
            )
    return rows


REACH = (
    ("transformers", OURS, "decode", 1, 2.2),
    ("transformers", OURS, "decode", 8, 1.5),
    ("transformers", OURS, "prefill", 1, 1.0),
    ("transformers", OURS, "prefill", 8, 1.0),
    ("llama.cpp", OURS, "decode", 8, 1.0),
    ("ctranslate2, float32", f"{OURS}, float32", "decode", 8, 1.0),
)
"""(other engine, own engine, phase, batch, expected ratio of the own speed to the other's)."""


def claims(rows: list[dict[str, Any]], floor: float) -> list[Claim]:
    """The claims about the engines that were measured."""
    found = {(row["batch"], row["contender"]): row for row in rows}
    made = [
        Claim(
            name="batch 1: share of the floor's decode tokens/s",
            expected=0.6,
            measured=round(found[1, OURS]["decode tokens/s"] / floor, 4),
            kind="at_least",
        )
    ]
    for peer, ours, side, batch, expected in REACH:
        if (batch, peer) not in found:
            continue
        ratio = found[batch, ours][f"{side} tokens/s"] / found[batch, peer][f"{side} tokens/s"]
        name = f"batch {batch}: {side}, {ours} against {peer}"
        made.append(Claim(name=name, expected=expected, measured=round(ratio, 4), kind="at_least"))
    return made


def run(options: argparse.Namespace) -> int:
    """Measures and prints a table; exit status 1 if a claim does not hold. Raises ValueError for a wrong checkpoint."""
    vocabulary = load_tokenizer(find_checkpoint(options.checkpoint)).vocab_size
    sizes = QUICK if options.quick else Sizes()
    report = Report.start(command=options.command, quick=options.quick)
    if report.load_before > BUSY:
        print(f"load average {report.load_before} is above {BUSY}: timings may be unreliable", file=sys.stderr)
    with tempfile.TemporaryDirectory() as directory:
        taking_part = contenders(options.checkpoint, options.peers, sizes, Path(directory) / "model")
        report.rows = measure(taking_part, sizes, vocabulary)
    rate = read_rate()
    shapes = build_shapes(open_checkpoint(find_checkpoint(options.checkpoint)).config)
    floor = rate / (2 * shapes.num_parameters())
    report.rows.append({"batch": 1, "contender": f"floor, {rate / 1e9:.1f} GB/s", "decode tokens/s": round(floor, 1)})
    report.claims = claims(report.rows, floor)
    report.print_table()
    if options.json is not None:
        report.write(options.json)
    return 0 if all(claim.holds for claim in report.claims) else 1


def main(words: list[str] | None = None) -> int:
    """Runs `attnzoo bench generate`; returns the exit status."""
    return carry_out("attnzoo bench generate", arguments.bench_generate, run, sys.argv[1:] if words is None else words)


if __name__ == "__main__":
    raise SystemExit(main())
