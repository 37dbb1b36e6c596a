"""Trains a model. `attnzoo train --config FILE` starts it on this machine. With DeepSpeed's command:

    deepspeed --num_accelerators 2 train/main.py --config rcmha.yaml
    deepspeed train/main.py --config rcmha.yaml train.steps=200 optim.lr=1e-3 run_dir=runs/try
    python train/main.py --config demo.yaml                # one process
    python train/main.py --config rcmha.yaml --dry-run     # print sizes and memory
    deepspeed train/main.py --config finetune.yaml checkpoint.init_from=smollm2   # fine-tune with adapters

The configuration's task (train/tasks) says what is trained; without one it is a language model. A bare name is looked
up in configs/. configs/base.yaml explains every key. After SIGTERM, Ctrl-C or closing the terminal, training finishes
its step, saves a checkpoint and exits with status 0; the same command resumes it. Exit status 2: a mistake found before
the run begins; 1: the run failed, and one line says why.
"""

import argparse
import os
import random
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # Run as a file: put the project's directory on the path instead of train/, so that `train` is a package and its
    # modules are not top-level ones.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from train.failures import import_variants

    import_variants()

import numpy as np
import torch
from tqdm import tqdm

from attnzoo.checkpoint.sources import plugin_sources
from attnzoo.errors import OutputError
from attnzoo.files import write_atomic
from attnzoo.report import Report, counted, run_command
from train import engine as engines
from train import ranks, run_directory
from train.best_weights import BestWeights
from train.budget import check_same_budget
from train.checkpoint import PLUGINS, Checkpoints, TrainingProgress, find_resume, identity
from train.checks import check_batches, check_run
from train.config import Config
from train.config_reader import load_config
from train.deepspeed_config import deepspeed_config
from train.engine import TrainingEngine
from train.export import export
from train.failures import report
from train.limits import MEASURED_STEPS
from train.loop import STOP_AT_STEP, TrainingRun, elapsed, measure_selected, train
from train.metrics import MetricsWriter, check_wandb, read_metrics
from train.plan import describe
from train.stop import Launcher, find_launcher
from train.tasks import Task, build_task
from train.watchdog import Watchdog


def main(arguments: list[str] | None = None) -> int:
    """Runs training. Returns exit status 0 after training or a stop by signal, else that of `failures.report`."""
    launcher = find_launcher()  # now, because the launcher may end before the training begins
    options = _parse(arguments)
    try:
        config = load_config(options.config, options.overrides)
        check_wandb(config.log.wandb)
        task = build_task(config)
        if options.dry_run:
            if _is_main():
                check_run(task)
                print(describe(task, task.shapes(), int(os.environ.get("WORLD_SIZE", "1"))))
            return 0
        deepspeed_config(config, int(os.environ.get("WORLD_SIZE", "1")))
        check_run(task)
        with Watchdog(config.watchdog) as watchdog:
            with watchdog.phase("start"):
                _tell(config, f"starting {counted(int(os.environ.get('WORLD_SIZE', '1')), 'rank')}")
                device = engines.start(config, options.local_rank)
            with run_directory.held(config):
                run_training(task, device, watchdog, launcher)
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, OutputError) or (options.dry_run and isinstance(error, BrokenPipeError)):
            raise
        return report(error, ranks.joined())
    finally:
        ranks.finish()
    return 0


def run_training(task: Task, device: torch.device, watchdog: Watchdog, launcher: Launcher | None = None) -> None:
    """Prepares data, trains, and writes the run directory; called by every rank.

    Raises AgreedError for an error that all ranks know of, TrainingError if this rank cannot go on.
    """
    config = task.config
    ranks.decide(lambda: run_directory.check_space(config, task.shapes()))
    with watchdog.phase("data"):
        _tell(config, f"preparing {task.preparing}")
        _prepare_data(task)
        ranks.agree(lambda: check_batches(config, task.train))
    with watchdog.phase("load"):
        _tell(config, f"building the model; checkpoints and metrics go to {config.run_path}")
        run, resumed = _begin(task, device, watchdog)
    run.saved_step, run.launcher = run.progress.step if resumed else -1, launcher
    reason = train(run)
    if reason is None and run.checkpoints.best.scores:
        with watchdog.phase("evaluate"):
            run.validation = ranks.decide(lambda: measure_selected(run))
    if run.metrics is not None:
        run.metrics.close()
    steps = {"steps": run.progress.step}
    with watchdog.phase("save"):
        whole = {**steps, **_metrics(run, reason), "name": config.name} if reason is None else steps
        export(run.engine, run.checkpoints.best, config.run_path / "export", whole)
    if run.engine.rank == 0:
        _summarize(run, reason)


def _begin(task: Task, device: torch.device, watchdog: Watchdog) -> tuple[TrainingRun, bool]:
    """(the run at the step where it begins, whether it comes from a checkpoint)."""
    config = task.config
    _seed(config.seed)  # the same initial weights on every rank
    model = ranks.agree(task.model)
    # Counted before ZeRO 3 partitions the weights.
    flops, parameters = task.flops(model), sum(parameter.numel() for parameter in model.parameters())
    if config.lora.rank is not None:
        ranks.agree(lambda: task.add_adapters(model))
    engine = TrainingEngine(task, model, device)
    settings = identity(config, task.content(), engine.world) | {PLUGINS: plugin_sources(model)}
    best = BestWeights(config.eval.keep_best or 0)
    checkpoints = Checkpoints(config.run_path / "checkpoints", config.checkpoint.keep, settings, best)
    progress, resumed = _resume(engine, checkpoints)
    engine.check_finite("training cannot begin with it; look at checkpoint.init_from and at model.init_std")
    metrics = None
    if engine.rank == 0:
        metrics = MetricsWriter(config, progress.step)
        write_atomic(config.run_path / "config.yaml", config.to_yaml().encode())
    return TrainingRun(engine, checkpoints, progress, metrics, watchdog, parameters, flops), resumed


def _prepare_data(task: Task) -> None:
    """Rank 0 builds what is missing, then the others open it. Raises AgreedError."""

    def first() -> None:
        if _is_main():
            with run_directory.preparing(task.config.cache_path):
                task.prepare(is_main=True)

    ranks.agree(first)
    ranks.agree(lambda: None if _is_main() else task.prepare(is_main=False))


def _resume(engine: TrainingEngine, checkpoints: Checkpoints) -> tuple[TrainingProgress, bool]:
    """(the progress to begin with, whether it comes from a checkpoint)."""
    config, batches = engine.task.config, engine.task.train
    options = config.checkpoint
    path = ranks.decide(lambda: find_resume(checkpoints, options.resume, options.fallback))
    if path is None:
        _seed(config.seed + 1 + engine.rank)
        steps = config.train.steps
        decided = config.train.max_minutes is None or (steps is not None and steps <= MEASURED_STEPS)
        return TrainingProgress(total_steps=steps if decided else None, data=batches.state()), False
    path = checkpoints.choose(path, engine, options.fallback)
    progress = checkpoints.load(engine, path)
    ranks.agree(lambda: check_same_budget(config.train, progress.budget))
    batches.load(progress.data)
    records = [config.run_path / name for name in ("metrics.jsonl", "samples.txt")]
    aside = ranks.decide(lambda: checkpoints.set_aside(path, records))
    if aside is not None and engine.rank == 0:
        tqdm.write(
            f"checkpoints that do not lead to {path} were moved to {aside}, with a copy of the metrics", sys.stderr
        )
    if config.train.max_minutes is None:
        progress.total_steps, progress.budget = config.train.steps, None
    if engine.rank == 0:
        tqdm.write(f"resuming from {path} at step {progress.step}", file=sys.stderr)
    return progress, True


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _metrics(run: TrainingRun, reason: str | None) -> dict[str, float | None]:
    """The export's metrics, unknown after an early stop, because the last step was not evaluated."""
    names = {"loss": "validation_loss"}
    return {names.get(name, name): None if reason else run.validation[name] for name in run.task.METRICS}


def _summarize(run: TrainingRun, reason: str | None) -> None:
    """Writes loss.png and training.json, and prints a summary."""
    config, progress, task = run.config, run.progress, run.task
    records = [r for r in read_metrics(config.run_path / "metrics.jsonl") if r["kind"] == "train"]
    seconds = [r["step_seconds"] for r in records]
    report, about = Report.start(seed=config.seed), task.summary()
    report.rows.append(
        {
            "name": config.name,
            "steps": progress.step,
            "complete": reason is None,
            "minutes": elapsed(run) / 60,
            **_metrics(run, reason),
            f"{task.UNIT}s_per_second": run.units_per_step * len(seconds) / sum(seconds) if seconds else 0.0,
            "ranks": run.engine.world,
            "parameters": run.parameters,
            **{name: value for name, value in about.items() if not isinstance(value, dict)},
        }
    )
    report.figures.append(task.figure().name)
    report.print_table()
    # Too large for the printed table:
    report.rows[0] |= {"data": about["data"], "budget": progress.budget, **task.findings.row()}
    if run.checkpoints.best.scores:
        report.rows[0]["selected_steps"] = sorted(int(step) for step, _ in run.checkpoints.best.scores)
    report.write(config.run_path / "training.json")
    for words in task.findings.words:
        print(words)
    if progress.budget is not None and progress.budget["short"] is not None:
        print(f"warning: {progress.budget['short']}")
    if reason == STOP_AT_STEP:
        print(
            f"stopped by {reason}={config.train.stop_at_step} after step {progress.step}; raise it or leave it out to "
            "go on"
        )
    elif reason is not None:
        print(f"stopped by {reason} after step {progress.step}; the same command resumes it")
    print(f"run directory {config.run_path}{task.NEXT.format(run=config.run_path)}", flush=True)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="a name in configs/, or a path")
    parser.add_argument("--dry-run", action="store_true", help="print configuration, sizes and memory; do not train")
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, default=int(os.environ.get("LOCAL_RANK", "0")), help=argparse.SUPPRESS
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.steps=100")
    return parser.parse_args(arguments)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors only rank 0 prints."""

    def error(self, message: str) -> Any:
        if _is_main():
            super().error(message)
        raise SystemExit(2)


def _tell(config: Config, what: str) -> None:
    """Prints what the run does before its first step."""
    if config.log.progress and _is_main():
        tqdm.write(f"{config.name}: {what}", file=sys.stderr)


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    sys.exit(run_command(main))
