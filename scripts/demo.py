"""The demo: trains a language model with DeepSpeed, serves it on Ray Serve, and reports the measurements.

    python -m scripts.demo                               # what `make demo` runs
    python -m scripts.demo --run-dir runs/mine --port 8123
    python -m scripts.demo --train-only --config long.yaml --run-dir runs/long      # what `make train` runs

An interrupted run in --run-dir is resumed. A finished run is used again, unless it missed a claim of its configuration
(eval.below_ngrams) or its budget was too small: then it is moved to another directory, and training begins anew. The
summary is written to RUN_DIR/summary.json. Exit status: 1 if a claim does not hold.
"""

import argparse
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnzoo.checkpoint import load_model
from attnzoo.report import Claim, Report, format_claims, format_table
from scripts.ngram_baseline import texts
from train.config_reader import load_config
from train.ngram import ngram_bits_per_byte
from train.plot import plot_losses
from train.run_directory import locked

PROMPTS = ["def read_lines(path):\n", "import os\nimport sys\n\n\nclass "]
READY_SECONDS = 180
ORDERS = (3, 4, 5, 6)
"""Orders of n-gram models that are shown besides those of the configuration."""
BELOW = "validation bits per byte below the order-"
"""The beginning of the names of claims about training."""


@dataclass
class Parts:
    """The seconds of each part, in the order in which they ran."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        print(f"\n== {name}", flush=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        print(f"-- {name}: {self.seconds[name]:.1f} s", flush=True)


def free_port() -> int:
    """A free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def train(config: str, run_dir: Path, ranks: int, overrides: list[str]) -> dict[str, Any]:
    """Trains with DeepSpeed on `ranks` processes, and returns training's report. Raises CalledProcessError."""
    words = ["train", "--config", config, "--ranks", str(ranks), f"run_dir={run_dir}", *overrides]
    print("$ attnzoo", " ".join(words), flush=True)
    subprocess.run([sys.executable, "-m", "attnzoo", *words], check=True)
    report: dict[str, Any] = json.loads((run_dir / "training.json").read_text(encoding="utf-8"))
    return report


@contextmanager
def served(checkpoint: Path, port: int) -> Iterator[str]:
    """A context in which `attnzoo serve` serves the checkpoint; yields its URL, and ends it with SIGTERM. Raises
    RuntimeError if the server does not start or does not exit cleanly."""
    words = ["serve", "--checkpoint", str(checkpoint), "--port", str(port)]
    print("$ attnzoo", " ".join(words), flush=True)
    process = subprocess.Popen([sys.executable, "-m", "attnzoo", *words])
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(url, process)
        yield url
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=60)
        if status != 0:
            raise RuntimeError(f"the server exited with status {status} after SIGTERM")
        print("the server shut down cleanly (exit status 0)", flush=True)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def wait_until_ready(url: str, process: "subprocess.Popen[bytes]") -> None:
    """Waits until /health answers with status 200. Raises RuntimeError if the server ends or takes too long."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode} before it was ready")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError(f"the server was not ready after {READY_SECONDS} s")


def complete(url: str, prompt: str, max_tokens: int) -> dict[str, Any]:
    """Runs one streaming completion with the OpenAI client; returns its text and measurements."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id
    start = time.perf_counter()
    stamps, pieces, usage = [], [], None
    stream = client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0.7,
        top_p=0.95,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        usage = chunk.usage or usage
        if chunk.choices and chunk.choices[0].text:
            stamps.append(time.perf_counter())
            pieces.append(chunk.choices[0].text)
    assert usage is not None, "the server sent no usage"
    extra = usage.model_dump()["attnzoo"]
    seconds = time.perf_counter() - start
    return {
        "prompt tokens": usage.prompt_tokens,
        "new tokens": usage.completion_tokens,
        "ttft ms": 1000 * (stamps[0] - start) if stamps else float("nan"),
        "tokens/s": usage.completion_tokens / seconds,
        "kv bytes/token": extra["kv_bytes_per_token"],
        "kv bytes": extra["kv_bytes"],
        "text": "".join(pieces),
    }


def complete_concurrently(url: str, max_tokens: int) -> list[dict[str, Any]]:
    """Completes all prompts at the same time, and prints the texts."""
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = list(pool.map(lambda prompt: complete(url, prompt, max_tokens), PROMPTS))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        print(f"--- prompt\n{prompt}--- completion\n{answer['text']}\n---")
    return answers


def why_anew(training: dict[str, Any] | None, summary: dict[str, Any] | None) -> str | None:
    """Why the run with these reports must not be used again; None if it may be, or is not finished.

    A summary of an earlier state of the run is ignored.
    """
    if training is None or not training["rows"][-1]["complete"]:
        return None
    row = training["rows"][-1]
    rows = [] if summary is None else [r for r in summary["rows"] if r.get("table") == "training"]
    claims = []
    if summary is not None and any(
        r["steps"] == row["steps"] and r["bits_per_byte"] == row["bits_per_byte"] for r in rows
    ):
        claims = [claim for claim in summary["claims"] if claim["name"].startswith(BELOW)]
    failed = [claim["name"] for claim in claims if not claim["holds"]]
    if failed:
        return f"did not reach what it claims ({failed[0]})"
    short = (row.get("budget") or {}).get("short")
    return None if claims or not short else f"had too small a budget ({short})"


def set_aside(run_dir: Path) -> Path | None:
    """Moves a run that must not be used again to another directory and prints a note; returns the directory or None.

    Raises ValueError if another process uses the run.
    """
    reason = why_anew(*(_read(run_dir / name) for name in ("training.json", "summary.json")))
    if reason is None:
        return None
    names = (run_dir.with_name(f"{run_dir.name}-set-aside-{n}") for n in itertools.count(1))
    place = next(path for path in names if not path.exists())
    with locked(run_dir):
        os.rename(run_dir, place)
    print(f"the finished run in {shown(run_dir)} {reason}: it is in {shown(place)} now, and training begins anew")
    return place


def _read(path: Path) -> dict[str, Any] | None:
    """A stored report; None if it does not exist. Raises ValueError if it is not JSON."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is no report of a run ({error}); move it away, or choose another --run-dir") from None
    return content


def shown(path: Path) -> str:
    """The path relative to the current directory if it is inside."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def below(run_dir: Path) -> list[int]:
    """Orders of the n-gram models in eval.below_ngrams of the run's configuration."""
    return load_config(str(run_dir / "config.yaml")).eval.below_ngrams


def baselines(run_dir: Path) -> dict[int, float]:
    """Bits per byte of the n-gram models, by order, on the run's training and validation text."""
    return ngram_bits_per_byte(*texts(str(run_dir / "config.yaml")), orders=sorted({*ORDERS, *below(run_dir)}))


def draw(run_dir: Path, trained: dict[str, Any], ngrams: dict[int, float]) -> None:
    """Draws loss.png with the n-gram models as lines."""
    lines = {f"order-{order} n-gram": value for order, value in ngrams.items()}
    plot_losses(run_dir, trained["train_bytes_per_token"], trained["name"], lines)


def claims(
    trained: dict[str, Any], ngrams: dict[int, float], answers: list[dict[str, Any]], run_dir: Path
) -> list[Claim]:
    """The claims: better than the n-gram models of the configuration; states as large as `cost` computes."""
    found = [
        Claim(name=f"{BELOW}{order} n-gram model", expected=ngrams[order], measured=trained["bits_per_byte"])
        for order in below(run_dir)
    ]
    if answers:
        model = load_model(run_dir / "export")
        held = [answer["prompt tokens"] + answer["new tokens"] - 1 for answer in answers]
        found.append(
            Claim(
                name="KV bytes of both completions as the cost says",
                expected=sum(model.cost(1, 1, tokens).state_bytes for tokens in held),
                measured=sum(answer["kv bytes"] for answer in answers),
                kind="equal",
            )
        )
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="demo.yaml", help="training config (default: %(default)s)")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"), help="(default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="training processes (default: %(default)s)")
    parser.add_argument("--port", type=int, help="port of the server (default: a free one)")
    parser.add_argument("--max-tokens", type=int, default=96, help="tokens of each completion (default: %(default)s)")
    parser.add_argument("--train-only", action="store_true", help="train, but do not serve")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="training options")
    return parser.parse_args(arguments)


def summarize(
    report: Report,
    parts: Parts,
    ngrams: dict[int, float],
    answers: list[dict[str, Any]],
    budget: dict[str, Any] | None,
) -> None:
    """Prints the tables, and adds their rows to the report. budget: a `train.budget.Budget` as a dictionary."""
    shown_budget = {k: v for k, v in (budget or {}).items() if k != "short"}
    tables = {
        "budget": [shown_budget] if budget else [],
        "n-gram models on the same text": [{"order": n, "bits_per_byte": value} for n, value in ngrams.items()],
        "completions, at the same time": [{k: v for k, v in answer.items() if k != "text"} for answer in answers],
        "time": [{"part": name, "seconds": round(value, 1)} for name, value in parts.seconds.items()],
    }
    for title, rows in tables.items():
        if rows:
            print(f"\n{title}\n{format_table(rows)}")
            report.rows += [{"table": title, **row} for row in rows]
    if budget:
        next(row for row in report.rows if row["table"] == "budget")["short"] = budget["short"]
    print()
    print(format_claims(report.claims))


def main() -> int:
    """Runs the demo; returns the exit status."""
    chosen = parse()
    run_dir = chosen.run_dir.expanduser().resolve()
    parts, report = Parts(), Report.start(command=["python", "-m", "scripts.demo", *sys.argv[1:]])
    answers: list[dict[str, Any]] = []
    try:
        set_aside(run_dir)
        with parts.time("train"):
            training = train(chosen.config, run_dir, chosen.ranks, chosen.overrides)
        trained = training["rows"][-1]
        with parts.time("n-gram models"):
            ngrams = baselines(run_dir)
            draw(run_dir, trained, ngrams)
        if not chosen.train_only:
            with parts.time("serve"), served(run_dir / "export", chosen.port or free_port()) as url:
                answers = complete_concurrently(url, chosen.max_tokens)
    except subprocess.CalledProcessError as error:
        print(f"demo: training ended with status {error.returncode}; its messages are above", file=sys.stderr)
        return 1
    except (RuntimeError, ValueError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    report.rows.append({"table": "training", **{k: v for k, v in trained.items() if not isinstance(v, dict)}})
    report.claims += claims(trained, ngrams, answers, run_dir)
    report.figures += training["figures"]
    budget = trained.get("budget")
    summarize(report, parts, ngrams, answers, budget)
    report.write(run_dir / "summary.json")
    if budget and budget["short"]:
        print(f"\nwarning: {budget['short']}")
    if any(claim.name.startswith(BELOW) and not claim.holds for claim in report.claims):
        print("\na claim on training does not hold: the same command moves this run away and trains anew")
    minutes = sum(parts.seconds.values()) / 60
    print(
        f"\n{minutes:.1f} minutes; summary in {shown(run_dir / 'summary.json')}, plot in {shown(run_dir / 'loss.png')}"
    )
    return report.exit_status()


if __name__ == "__main__":
    sys.exit(main())
