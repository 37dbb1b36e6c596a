"""Sends streamed completions over HTTP with little work on the client's side, and starts servers to send them to."""

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Target:
    """Where a server listens, and the name of its model."""

    host: str
    port: int
    model: str


@dataclass(frozen=True)
class Timing:
    """Times of one request in seconds. ttft: to the first text. tpot: per output token after it. gaps: between pieces
    of the answer."""

    ttft: float
    tpot: float
    text: str
    gaps: tuple[float, ...] = ()


async def run_http(
    target: Target, prompts: Sequence[list[int]], clients: int, fields: Mapping[str, Any]
) -> list[Timing]:
    """Runs all prompts as HTTP streams, over `clients` connections that stay open. fields: of each body beside model
    and prompt; max_tokens is one, and no answer may be shorter. Raises RuntimeError for an answer that is an error."""
    timings: dict[int, Timing] = {}
    todo = list(range(len(prompts)))[::-1]

    async def client() -> None:
        reader, writer = await asyncio.open_connection(target.host, target.port)
        while todo:
            index = todo.pop()
            body = {"model": target.model, "prompt": prompts[index], **fields, "stream": True}
            timings[index] = await stream(reader, writer, body)
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return [timings[index] for index in range(len(prompts))]


async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: dict[str, Any]) -> Timing:
    """Runs one streamed completion over an open connection."""
    data = json.dumps(body).encode()
    fields = f"host: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
    head = f"POST /v1/completions HTTP/1.1\r\n{fields}\r\n\r\n"
    sent = time.perf_counter()
    writer.write(head.encode() + data)
    answer = await reader.readuntil(b"\r\n\r\n")
    if not answer.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"the server answered {answer.splitlines()[0].decode()}")
    times, events = [], []
    while size := int((await reader.readuntil(b"\r\n")).strip(), 16):
        chunk = await reader.readexactly(size + 2)
        times.append(time.perf_counter())
        events.append(chunk[:-2])
    await reader.readuntil(b"\r\n")
    choices = [json.loads(event[6:])["choices"][0] for event in b"".join(events).split(b"\n\n") if event[6:7] == b"{"]
    tpot = (times[-1] - times[0]) / max(body["max_tokens"] - 1, 1)
    gaps = tuple(after - before for before, after in pairwise(times))
    return Timing(times[0] - sent, tpot, "".join(c["text"] for c in choices), gaps)


class Server:
    """A context manager that runs `attnzoo serve` on a free port.

    settings: key=value words. directory: of another tree of this project, whose server it is. Raises RuntimeError if it
    does not start.
    """

    def __init__(self, checkpoint: Path, settings: Sequence[str] = (), directory: Path | None = None) -> None:
        where = str(checkpoint.resolve()) if checkpoint.exists() else str(checkpoint)
        command = [sys.executable, "-m", "attnzoo", "serve", "--checkpoint", where, "--port", "0", *settings]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=directory)
        assert self.process.stdout is not None
        found = re.search(r"serving '(.+)' on http://127\.0\.0\.1:(\d+)", self.process.stdout.readline())
        if not found:
            raise RuntimeError("the server did not start; its messages are above")
        self.target = Target("127.0.0.1", int(found[2]), found[1])

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(60)
