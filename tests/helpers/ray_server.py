"""`python -m serve` with Ray Serve as a process of its own, and what its small model answers."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import openai
import psutil

from attnzoo.models import generate
from tests.helpers import plain_http  # noqa: F401
from tests.helpers.serving import export, small_model, tokenizer

ROOT = Path(__file__).resolve().parents[2]
DEPLOYMENT = ROOT / "configs/serve/ray/deploy.yaml"


def environment() -> dict[str, str]:
    """Of a process that finds the repository and no cluster of anyone else."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    # An address of a cluster that is not there, such as is left in a shell, must not matter.
    return {**kept, "RAY_ADDRESS": "192.0.2.1:6379", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


class Running:
    """A server process, its URL, and what it wrote."""

    def __init__(self, directory: Path, *settings: str) -> None:
        checkpoint = export(directory / "tiny" / "export", max_len=1024)
        command = [sys.executable, "-m", "serve", "--checkpoint", str(checkpoint), "--port", "0", *settings]
        self.directory = directory
        own = environment() | {"ATTNZOO_HOME": str(directory / "home")}  # where the token goes
        self.process = subprocess.Popen(
            command, cwd=directory, env=own, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.errors: list[str] = []
        threading.Thread(target=lambda: self.errors.extend(self.process.stderr), daemon=True).start()
        line = self.process.stdout.readline()
        found = re.search(r"serving 'tiny'.* on (http://127\.0\.0\.1:\d+)", line)
        if not found:
            self.process.kill()
            raise AssertionError(f"{line!r}, stderr: {''.join(self.errors)}")
        self.url = found[1]
        self.curl = self.process.stdout.readline()
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def family(self) -> list[psutil.Process]:
        """The server's process and all that it started."""
        return [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]

    def metric(self, name: str) -> float:
        """A number of /metrics."""
        text = httpx.get(f"{self.url}/metrics").text
        return float(re.search(rf"^attnzoo_{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])


def expected(prompt: str, count: int) -> str:
    """What the plain loop generates for the server's model."""
    tokens = [tokenizer().encode(prompt, bos=True)]
    return tokenizer().decode(generate(small_model("rcmha", max_len=1024), tokens, max_new_tokens=count)[0])
