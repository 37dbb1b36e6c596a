"""`attnzoo bench train`: training throughput under DeepSpeed, against a plain PyTorch loop."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from attnzoo.cli import carry_out
from attnzoo.models import DecoderLM
from attnzoo.report import Claim, Report
from scripts import arguments
from train.config import Config
from train.config_reader import load_config
from train.engine import TrainingEngine, start
from train.optim import build_optimizer, set_rate
from train.ranks import finish
from train.tasks import LanguageTask

BUSY = 0.75
"""A higher load average makes timings unreliable."""
VOCABULARY = 2048

Batch = tuple[Tensor, Tensor]
StepFunction = Callable[[Batch], float]


def build(config: Config) -> DecoderLM:
    """A new model, with the same weights for both loops."""
    torch.manual_seed(config.seed)
    return DecoderLM(config.model_config(VOCABULARY))


def bare_step(config: Config) -> StepFunction:
    """The step of a plain PyTorch loop."""
    model = build(config)
    optimizer = build_optimizer(model, config.optim)
    set_rate(optimizer, 1.0)

    def step(batch: Batch) -> float:
        optimizer.zero_grad()
        loss = model.loss(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.train.gradient_clipping)
        optimizer.step()
        return loss.item()

    return step


def engine_step(config: Config, device: torch.device) -> StepFunction:
    """The step of the engine that train/main.py uses."""
    engine = TrainingEngine(LanguageTask(config), build(config), device)

    def step(batch: Batch) -> float:
        loss = engine.forward_backward(batch, float(batch[1].numel()))
        engine.step(1.0)
        return loss.item()

    return step


def measure(steps: dict[str, StepFunction], batches: list[Batch], turns: int) -> dict[str, list[float]]:
    """Seconds of every step, by loop. The loops take turns step by step, and alternate in going first, so that changes
    of speed affect both. Raises RuntimeError if their losses differ."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns + 1):
        for number, batch in enumerate(batches):
            names = list(steps) if (turn + number) % 2 else list(reversed(steps))
            losses = []
            for name in names:
                begin = time.perf_counter()
                losses.append(steps[name](batch))
                if turn > 0:  # the first turn warms up
                    seconds[name].append(time.perf_counter() - begin)
            if not torch.allclose(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-3):
                raise RuntimeError(f"the loops do not train the same model: {losses[0]} against {losses[1]}")
    return seconds


def run(options: argparse.Namespace) -> int:
    """Measures and prints a table; exit status 1 if the claim does not hold. Raises ValueError for a wrong
    configuration."""
    arguments.check_counts(options)
    size = ["train.batch_size=8", "train.micro_batch_size=8", "zero.stage=0", "train.threads=1"]
    if options.quick:
        size = [
            "train.batch_size=2",
            "train.micro_batch_size=2",
            "zero.stage=0",
            "train.threads=1",
            "model.num_layers=1",
        ]
    config = load_config(options.config, size)
    report = Report.start(command=options.command, seed=config.seed, quick=options.quick)
    if report.load_before > BUSY:
        print(f"load average {report.load_before} is above {BUSY}: timings may be unreliable", file=sys.stderr)
    device = start(config, 0)
    generator = torch.Generator().manual_seed(config.seed)
    shape = (config.train.batch_size, config.sequence_length + 1)
    blocks = [torch.randint(0, VOCABULARY, shape, generator=generator) for _ in range(3)]
    batches = [(block[:, :-1], block[:, 1:]) for block in blocks]
    steps = {"bare PyTorch": bare_step(config), "attnzoo engine": engine_step(config, device)}
    seconds = measure(steps, batches, 2 if options.quick else options.turns)
    finish()
    tokens = config.train.batch_size * config.sequence_length
    for name, values in seconds.items():
        report.rows.append(
            {
                "loop": name,
                "step_ms": statistics.median(values) * 1e3,
                "fastest_ms": min(values) * 1e3,
                "slowest_ms": max(values) * 1e3,
                "tokens_per_second": tokens / statistics.median(values),
            }
        )
    bare, mine = seconds.values()
    # Neighbouring steps have the same load, so that the median of ratios is steadier than the ratio of medians.
    ratio = statistics.median(b / m for b, m in zip(bare, mine, strict=True))
    report.claims.append(Claim(name="throughput over bare PyTorch", expected=0.95, measured=ratio, kind="at_least"))
    report.print_table()
    if options.json:
        report.write(options.json)
    return report.exit_status()


def main(words: list[str] | None = None) -> int:
    """Runs `attnzoo bench train`; returns the exit status."""
    return carry_out("attnzoo bench train", arguments.bench_train, run, sys.argv[1:] if words is None else words)


if __name__ == "__main__":
    sys.exit(main())
