"""Throughput and latency of servers under load, side by side: what `attnzoo bench serve --streams` measures.

A side is this project's server with some settings, from this tree or another one, or any server with an interface like
OpenAI's. All sides run at the same time and take turns, so that drift of the machine affects each; a server that waits
takes next to nothing.
"""

import asyncio
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from attnzoo.report import Report
from scripts.serve_client import Server, Target, Timing, run_http


@dataclass(frozen=True)
class Side:
    """name: in the table. settings: key=value words of the server. directory: of a tree whose server it is; None: this
    one. target: a server that runs already."""

    name: str
    settings: tuple[str, ...] = ()
    directory: Path | None = None
    target: Target | None = None


@dataclass(frozen=True)
class Load:
    """streams: how many requests are open at a time. requests: of each stream in a round. rounds: turns of each side.
    prompt_tokens, new_tokens: of each request. sampled: temperature 0.8, top_p 0.95 and a seed; else greedy. logprobs:
    alternatives to report. Raises ValueError for numbers below 1."""

    streams: tuple[int, ...]
    requests: int = 2
    rounds: int = 3
    prompt_tokens: int = 64
    new_tokens: int = 64
    sampled: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in ("requests", "rounds", "prompt_tokens", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        if min(self.streams, default=0) < 1:
            raise ValueError(f"--streams {' '.join(map(str, self.streams))}: give numbers of at least 1")

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of each request's body beside the prompt."""
        options: dict[str, Any] = {"max_tokens": self.new_tokens, "ignore_eos": True, "temperature": 0}
        if self.sampled:
            options |= {"temperature": 0.8, "top_p": 0.95, "seed": 7}
        return options if self.logprobs is None else {**options, "logprobs": self.logprobs}


def read_side(words: str) -> Side:
    """A side from "NAME[@DIRECTORY] [key=value ...]" or "NAME=URL/MODEL". Raises ValueError."""
    first, *settings = words.split() or [""]
    name, has_url, url = first.partition("=")
    if has_url:
        found = urlsplit(url)
        if settings or not (name and found.hostname and found.port and found.path.strip("/")):
            raise ValueError(f"--side {words!r}: a server that runs is NAME=http://HOST:PORT/MODEL and nothing more")
        return Side(name, target=Target(found.hostname, found.port, found.path.strip("/")))
    name, _, directory = first.partition("@")
    wrong = next((word for word in settings if "=" not in word), None)
    if not name or wrong is not None:
        raise ValueError(f"--side {words!r}: give NAME, NAME@DIRECTORY or NAME=URL/MODEL, then settings as key=value")
    if directory and not (Path(directory) / "attnzoo").is_dir():
        raise ValueError(f"--side {words!r}: {directory} holds no tree of this project")
    return Side(name, tuple(settings), Path(directory) if directory else None)


def quantile_ms(values: Sequence[float], share: float) -> float:
    """The smallest value, in milliseconds, that `share` of the values do not exceed."""
    ordered = sorted(values)
    return round(1000 * ordered[max(0, -int(-share * len(ordered) // 1) - 1)], 2)


def summary(timings: Sequence[Timing], seconds: Sequence[float], new_tokens: int) -> dict[str, Any]:
    """The columns of one side. seconds: of its rounds, which had equally many requests; throughput is their median."""
    per_round = len(timings) / len(seconds) * new_tokens
    gaps = [gap for timing in timings for gap in timing.gaps]
    return {
        "requests": len(timings),
        "tokens/s": round(per_round / sorted(seconds)[len(seconds) // 2], 1),
        "best": round(per_round / min(seconds), 1),
        "ttft p50 ms": quantile_ms([t.ttft for t in timings], 0.5),
        "ttft p99 ms": quantile_ms([t.ttft for t in timings], 0.99),
        "tpot p50 ms": quantile_ms([t.tpot for t in timings], 0.5),
        "tpot p99 ms": quantile_ms([t.tpot for t in timings], 0.99),
        "gap p99 ms": quantile_ms(gaps, 0.99) if gaps else "",
    }


def random_prompts(count: int, load: Load, vocabulary: int, seed: int) -> list[list[int]]:
    """Token ids, the same in every run; other ones for another seed, so that no server finds them in its cache."""
    generator = torch.Generator().manual_seed(seed)
    prompts: list[list[int]] = torch.randint(3, vocabulary, (count, load.prompt_tokens), generator=generator).tolist()
    return prompts


def measure_load(checkpoint: Path, sides: Sequence[Side], load: Load, vocabulary: int, report: Report) -> None:
    """Fills in a row for each number of streams and side, with its throughput as a share of the first side's. Raises
    RuntimeError where a server does not start or answers with an error."""
    with ExitStack() as stack:
        targets = {side.name: _target(stack, side, checkpoint) for side in sides}
        for streams in load.streams:
            rows = _measure_streams(targets, streams, load, vocabulary)
            first = next(iter(rows.values()))["tokens/s"]
            for name, row in rows.items():
                share = round(row["tokens/s"] / first, 3)
                report.rows.append({"streams": streams, "side": name, **row, "times the first": share})


def _target(stack: ExitStack, side: Side, checkpoint: Path) -> Target:
    if side.target is not None:
        return side.target
    try:
        server = Server(checkpoint, ("max_num_seqs=64", *side.settings), side.directory)
    except RuntimeError as error:
        raise RuntimeError(f"side {side.name}: {error}") from error
    return stack.enter_context(server).target


def rotated(names: list[str], turn: int) -> list[str]:
    """The names, each turn beginning with another one: what comes first in a turn may be slower."""
    first = turn % len(names)
    return names[first:] + names[:first]


def _measure_streams(targets: dict[str, Target], streams: int, load: Load, vocabulary: int) -> dict[str, dict]:
    timings: dict[str, list[Timing]] = {name: [] for name in targets}
    seconds: dict[str, list[float]] = {name: [] for name in targets}
    for turn in range(load.rounds + 1):
        prompts = random_prompts(streams * load.requests, load, vocabulary, 1000 * streams + turn)
        for name in rotated(list(targets), turn):
            begin = time.perf_counter()
            try:
                found = asyncio.run(run_http(targets[name], prompts, streams, load.fields))
            except (OSError, EOFError, RuntimeError) as error:
                target = targets[name]
                where = f"http://{target.host}:{target.port}/{target.model}"
                raise RuntimeError(f"side {name}, {where}: {error}; is it up, and the model's name right?") from error
            if turn:  # the first one warms up
                timings[name] += found
                seconds[name].append(time.perf_counter() - begin)
    return {name: summary(timings[name], seconds[name], load.new_tokens) for name in targets}
