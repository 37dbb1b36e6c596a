"""`attnzoo bench serve`: the overhead of Ray Serve and HTTP over the plain engine."""

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as Ray sets it for a replica with one CPU

import torch

from attnzoo.checkpoint import save_model
from attnzoo.cli import carry_out
from attnzoo.errors import complain
from attnzoo.models import DecoderConfig, DecoderLM
from attnzoo.report import Claim, Report, available_cores
from attnzoo.tokenizer import SentencePieceTokenizer
from scripts import arguments
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


@dataclass(frozen=True)
class Timing:
    """Times of one request in seconds. ttft: to the first text. tpot: per output token after it."""

    ttft: float
    tpot: float
    text: str


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


async def run_http(port: int, model: str, prompts: Sequence[list[int]], clients: int, sizes: Sizes) -> list[Timing]:
    """Runs all prompts as HTTP streams, over `clients` connections that stay open."""
    timings: dict[int, Timing] = {}
    todo = list(range(len(prompts)))[::-1]

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while todo:
            index = todo.pop()
            body = {"model": model, "prompt": prompts[index], "max_tokens": sizes.new_tokens, "temperature": 0}
            timings[index] = await stream(reader, writer, {**body, "ignore_eos": True, "stream": True}, sizes)
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return [timings[index] for index in range(len(prompts))]


async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: dict, sizes: Sizes) -> Timing:
    """Runs one streamed completion over an open connection, with little work on the client's side."""
    data = json.dumps(body).encode()
    fields = f"host: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
    head = f"POST /v1/completions HTTP/1.1\r\n{fields}\r\n\r\n"
    sent = time.perf_counter()
    writer.write(head.encode() + data)
    answer = await reader.readuntil(b"\r\n\r\n")
    if not answer.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"the server answered {answer.splitlines()[0].decode()}")
    first = last = 0.0
    events = []
    while size := int((await reader.readuntil(b"\r\n")).strip(), 16):
        chunk = await reader.readexactly(size + 2)
        last = time.perf_counter()
        first = first or last
        events.append(chunk[:-2])
    await reader.readuntil(b"\r\n")
    choices = [json.loads(event[6:])["choices"][0] for event in b"".join(events).split(b"\n\n") if event[6:7] == b"{"]
    return Timing(first - sent, (last - first) / (sizes.new_tokens - 1), "".join(c["text"] for c in choices))


class Server:
    """A context manager that runs `attnzoo serve` on a free port."""

    def __init__(self, checkpoint: Path) -> None:
        command = [
            sys.executable,
            "-m",
            "attnzoo",
            "serve",
            "--checkpoint",
            str(checkpoint),
            "--port",
            "0",
            "threads=1",
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        found = re.search(r"serving '(.+)' on http://127\.0\.0\.1:(\d+)", self.process.stdout.readline())
        if not found:
            raise RuntimeError("the server did not start; its messages are above")
        self.model, self.port = found[1], int(found[2])

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(60)


def median_ms(values: Sequence[float]) -> float:
    """Median in milliseconds."""
    return round(1000 * statistics.median(values), 3)


def measure(checkpoint: Path, sizes: Sizes, report: Report) -> None:
    """Fills the report: for each number of clients a row for each side and one for their difference."""
    engine = Engine(EngineConfig(checkpoint=str(checkpoint), threads=1))
    prompts = make_prompts(engine.tokenizer.vocab_size, sizes)
    different = 0
    with Server(checkpoint) as server:
        for clients in (1, 4):
            plain: list[Timing] = []
            served: list[Timing] = []
            warm = prompts[: 2 * clients]
            run_engine(engine, warm, clients, sizes)
            asyncio.run(run_http(server.port, server.model, warm, clients, sizes))
            for _ in range(sizes.rounds):
                plain += run_engine(engine, prompts, clients, sizes)
                served += asyncio.run(run_http(server.port, server.model, prompts, clients, sizes))
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


def run(options: argparse.Namespace) -> int:
    """Measures and prints a table; exit status 1 if a claim does not hold. Raises ValueError on a busy machine and
    for a wrong checkpoint."""
    load, cores = os.getloadavg()[0], available_cores()
    if load > cores / 2 and not (options.busy or options.quick):
        raise ValueError(f"load average {load:.2f} on {cores} cores makes timings unreliable; wait, or use --busy")
    report = Report.start(command=options.command, quick=options.quick)
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = options.checkpoint or make_checkpoint(Path(directory))
        try:
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
