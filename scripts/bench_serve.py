"""`attnzoo bench serve`: the overhead of Ray Serve and HTTP over the plain engine, or servers under load."""

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from attnzoo.checkpoint import find_checkpoint, load_tokenizer, save_model
from attnzoo.cli import carry_out
from attnzoo.errors import complain
from attnzoo.models import DecoderConfig, DecoderLM
from attnzoo.report import Claim, Report, available_cores
from attnzoo.tokenizer import SentencePieceTokenizer
from scripts import arguments
from scripts.serve_client import Server, Timing, run_http
from scripts.serve_load import Load, measure_load, read_side
from serve.config import EngineConfig
from serve.engine import Engine
from serve.request import SamplingParams

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Sizes:
    """requests: in a round. rounds: turns of each side. prompt_tokens, new_tokens: of each request."""

    requests: int
    rounds: int
    prompt_tokens: int
    new_tokens: int


FULL = Sizes(requests=24, rounds=3, prompt_tokens=64, new_tokens=64)
QUICK = Sizes(requests=6, rounds=1, prompt_tokens=64, new_tokens=32)


def make_checkpoint(directory: Path) -> Path:
    """A model with random weights (4 layers of RCMHA, width 128) and a tokenizer trained on this project's sources."""
    from train.tokenizer import train_tokenizer

    lines = [line for path in sorted(ROOT.glob("*/*.py")) for line in path.read_text(encoding="utf-8").splitlines()]
    tokenizer = SentencePieceTokenizer.load(train_tokenizer(lines, 1024, directory / "tokenizer.model"))
    torch.manual_seed(0)
    config = DecoderConfig(vocab_size=1024, model_dim=128, num_layers=4, attention="rcmha", max_positions=512)
    return save_model(directory / "random" / "export", DecoderLM(config), tokenizer=tokenizer)


def make_prompts(vocabulary: int, sizes: Sizes) -> list[list[int]]:
    """Random token ids, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    shape = (sizes.requests, sizes.prompt_tokens)
    prompts: list[list[int]] = torch.randint(3, vocabulary, shape, generator=generator).tolist()
    return prompts


def run_engine(engine: Engine, prompts: Sequence[list[int]], clients: int, sizes: Sizes) -> list[Timing]:
    """Runs all prompts with `Engine.step`, at most `clients` at a time."""
    params = SamplingParams(max_tokens=sizes.new_tokens, ignore_eos=True)
    todo = list(range(len(prompts)))[::-1]
    sent: dict[str, float] = {}
    first: dict[str, float] = {}
    texts: dict[str, str] = {}
    timings: dict[str, Timing] = {}
    while todo or engine.has_work():
        while todo and len(sent) - len(timings) < clients:
            index = str(todo.pop())
            sent[index], texts[index] = time.perf_counter(), ""
            engine.add_request(index, prompts[int(index)], params)
        for delta in engine.step():
            now, index = time.perf_counter(), delta.request_id
            texts[index] += delta.text
            if delta.text:
                first.setdefault(index, now)
            if delta.finish_reason is not None:
                tpot = (now - sent[index] - (first[index] - sent[index])) / (delta.tokens - 1)
                timings[index] = Timing(first[index] - sent[index], tpot, texts[index])
    return [timings[str(index)] for index in range(len(prompts))]


def median_ms(values: Sequence[float]) -> float:
    """Median in milliseconds."""
    return round(1000 * statistics.median(values), 3)


def measure(checkpoint: Path, sizes: Sizes, report: Report) -> None:
    """Fills the report: for each number of clients a row for each side and one for their difference."""
    threads = None if "OMP_NUM_THREADS" in os.environ else available_cores()  # as the server
    engine = Engine(EngineConfig(checkpoint=str(checkpoint), threads=threads))
    prompts = make_prompts(engine.tokenizer.vocab_size, sizes)
    different = 0
    fields = {"max_tokens": sizes.new_tokens, "temperature": 0, "ignore_eos": True}
    with Server(checkpoint, []) as server:
        for clients in (1, 4):
            plain: list[Timing] = []
            served: list[Timing] = []
            warm = prompts[: 2 * clients]
            run_engine(engine, warm, clients, sizes)
            asyncio.run(run_http(server.target, warm, clients, fields))
            for _ in range(sizes.rounds):
                plain += run_engine(engine, prompts, clients, sizes)
                served += asyncio.run(run_http(server.target, prompts, clients, fields))
            different += sum(a.text != b.text for a, b in zip(plain, served, strict=True))
            sides = {"engine": plain, "ray serve": served}
            rows = {
                name: (median_ms([t.ttft for t in timings]), median_ms([t.tpot for t in timings]))
                for name, timings in sides.items()
            }
            rows["difference"] = (
                round(rows["ray serve"][0] - rows["engine"][0], 3),
                round(rows["ray serve"][1] - rows["engine"][1], 3),
            )
            for name, (ttft, tpot) in rows.items():
                count = len(plain) if name != "difference" else ""
                report.rows.append(
                    {"clients": clients, "side": name, "requests": count, "ttft_ms": ttft, "tpot_ms": tpot}
                )
    report.claims.append(Claim(name="texts that differ", expected=0, measured=different, kind="equal"))


def load_of(options: argparse.Namespace) -> Load:
    """The load that the options describe."""
    rounds = 1 if options.quick else options.rounds
    return Load(
        tuple(options.streams),
        options.requests,
        rounds,
        options.prompt_tokens,
        options.new_tokens,
        options.sampled,
        options.logprobs,
    )


def run(options: argparse.Namespace) -> int:
    """Measures and prints a table; exit status 1 if a claim does not hold. Raises ValueError on a busy machine and
    for a wrong checkpoint."""
    sides = [read_side(words) for words in options.side or ["ours"]]
    if len({side.name for side in sides}) < len(sides):
        raise ValueError("two sides have the same name")
    if options.side and not options.streams:
        raise ValueError("--side needs --streams, for example --streams 1 8 32")
    load_of_servers = load_of(options) if options.streams else None
    load, cores = os.getloadavg()[0], available_cores()
    if load > cores / 2 and not (options.busy or options.quick):
        raise ValueError(f"load average {load:.2f} on {cores} cores makes timings unreliable; wait, or use --busy")
    report = Report.start(command=options.command, quick=options.quick)
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = options.checkpoint or make_checkpoint(Path(directory))
        try:
            if load_of_servers is not None:
                vocabulary = load_tokenizer(find_checkpoint(str(checkpoint))).vocab_size
                measure_load(checkpoint, sides, load_of_servers, vocabulary, report)
            else:
                measure(checkpoint, QUICK if options.quick else FULL, report)
        except RuntimeError as error:
            return complain("attnzoo bench serve", str(error), 1)
    report.print_table()
    if options.json:
        report.write(options.json)
    return report.exit_status()


def main(words: list[str] | None = None) -> int:
    """Runs `attnzoo bench serve`; returns the exit status."""
    return carry_out("attnzoo bench serve", arguments.bench_serve, run, sys.argv[1:] if words is None else words)


if __name__ == "__main__":
    sys.exit(main())
