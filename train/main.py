"""Trains a language model. `attnzoo train --config FILE` starts it on this machine. With DeepSpeed's command:

    deepspeed --num_accelerators 2 train/main.py --config rcmha.yaml
    deepspeed train/main.py --config rcmha.yaml train.steps=200 optim.lr=1e-3 run_dir=runs/try
    python train/main.py --config demo.yaml                # one process
    python train/main.py --config rcmha.yaml --dry-run     # print sizes and memory
    deepspeed train/main.py --config finetune.yaml checkpoint.init_from=smollm2   # fine-tune with adapters

A bare name is looked up in configs/. configs/base.yaml explains every key. After SIGTERM, Ctrl-C or closing the
terminal, training finishes its step, saves a checkpoint and exits with status 0; the same command resumes it. Exit
status 2: a mistake found before the run begins; 1: the run failed, and one line says why.
"""

import argparse
import os
import random
import sys
from dataclasses import replace
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

from attnzoo.checkpoint import find_checkpoint
from attnzoo.files import user_path, write_atomic
from attnzoo.models import DecoderConfig, DecoderLM
from attnzoo.report import Report, counted, run_command
from attnzoo.tokenizer import Tokenizer, load_tokenizer
from attnzoo.types import build_config
from train import engine as engines
from train import ranks, run_directory
from train.budget import check_same_budget
from train.checkpoint import Checkpoints, TrainingProgress, find_resume, identity
from train.checks import check_batches, check_length, check_run
from train.config import Config
from train.config_reader import load_config
from train.data import DataConfig, TrainingData, prepare
from train.deepspeed_config import deepspeed_config
from train.engine import TrainingEngine
from train.export import adopted_model, export, init_from
from train.failures import report
from train.limits import MEASURED_STEPS
from train.loop import STOP_AT_STEP, TrainingRun, train
from train.lora import add_adapters
from train.metrics import MetricsWriter, check_wandb, read_metrics
from train.plan import describe
from train.plot import plot_losses
from train.stop import Launcher, find_launcher
from train.tokenizer import TokenizerConfig, ensure_tokenizer
from train.watchdog import Watchdog


def main(arguments: list[str] | None = None) -> int:
    """Runs training. Returns exit status 0 after training or a stop by signal, else that of `failures.report`."""
    launcher = find_launcher()  # now, because the launcher may end before the training begins
    options = _parse(arguments)
    try:
        config = load_config(options.config, options.overrides)
        check_wandb(config.log.wandb)
        if options.dry_run:
            if _is_main():
                planned = _planned_model(config)
                check_run(config, planned)
                print(describe(config, planned, int(os.environ.get("WORLD_SIZE", "1"))))
            return 0
        deepspeed_config(config, int(os.environ.get("WORLD_SIZE", "1")))
        check_run(config, _planned_model(config))
        with Watchdog(config.watchdog) as watchdog:
            with watchdog.phase("start"):
                _tell(config, f"starting {counted(int(os.environ.get('WORLD_SIZE', '1')), 'rank')}")
                device = engines.start(config, options.local_rank)
            with run_directory.held(config):
                run_training(config, device, watchdog, launcher)
    except (Exception, KeyboardInterrupt) as error:
        if options.dry_run and isinstance(error, BrokenPipeError):
            raise
        return report(error, ranks.joined())
    finally:
        ranks.finish()
    return 0


def run_training(config: Config, device: torch.device, watchdog: Watchdog, launcher: Launcher | None = None) -> None:
    """Prepares data, trains, and writes the run directory; called by every rank.

    Raises AgreedError for an error that all ranks know of, TrainingError if this rank cannot go on.
    """
    ranks.decide(lambda: run_directory.check_space(config, _planned_model(config)))
    with watchdog.phase("data"):
        _tell(config, f"preparing the tokenizer and the tokens of data.source={config.data.get('source')!r}")
        tokenizer_path, data = _prepare_data(config)
        ranks.agree(lambda: check_batches(config, data))
    with watchdog.phase("load"):
        _tell(config, f"building the model; checkpoints and metrics go to {config.run_path}")
        run, resumed = _begin(config, device, watchdog, tokenizer_path, data)
    run.saved_step, run.launcher = run.progress.step if resumed else -1, launcher
    reason = train(run)
    if run.metrics is not None:
        run.metrics.close()
    progress, (loss, bits) = run.progress, run.validation
    metadata = {"steps": progress.step, "validation_loss": loss, "bits_per_byte": bits, "name": config.name}
    with watchdog.phase("save"):
        whole = metadata if reason is None else {"steps": progress.step}
        export(run.engine, config.run_path / "export", run.tokenizer, whole)
    if run.engine.rank == 0:
        _summarize(run, reason)


def _begin(
    config: Config, device: torch.device, watchdog: Watchdog, tokenizer_path: Path, data: TrainingData
) -> tuple[TrainingRun, bool]:
    """(the run at the step where it begins, whether it comes from a checkpoint)."""
    tokenizer = ranks.agree(lambda: load_tokenizer(tokenizer_path))
    model = ranks.agree(lambda: _build_model(config, tokenizer))
    # Counted before ZeRO 3 partitions the weights. The backward pass takes twice the FLOPs of the forward pass.
    flops = 3 * model.cost(config.train.batch_size, config.sequence_length, config.sequence_length).flops
    parameters = model.num_parameters()
    if config.lora.rank is not None:
        ranks.agree(lambda: add_adapters(model, config.lora))
    engine = TrainingEngine(config, model, device, tokenizer.bos_id if config.data.get("isolate_documents") else None)
    settings = identity(config, model.config.to_dict(), tokenizer.fingerprint(), data.digest, engine.world)
    checkpoints = Checkpoints(config.run_path / "checkpoints", config.checkpoint.keep, settings)
    progress, resumed = _resume(config, engine, checkpoints, data)
    engine.check_finite("training cannot begin with it; look at checkpoint.init_from and at model.init_std")
    metrics = None
    if engine.rank == 0:
        metrics = MetricsWriter(config, progress.step)
        write_atomic(config.run_path / "config.yaml", config.to_yaml().encode())
    return TrainingRun(
        config, engine, data, tokenizer, checkpoints, progress, metrics, parameters, flops, watchdog
    ), resumed


def _prepare_data(config: Config) -> tuple[Path, TrainingData]:
    """(path of the tokenizer, data). Rank 0 builds what is missing, then the others open it. Raises AgreedError."""
    data_config = build_config(DataConfig, {"seed": config.seed, **config.data}, "data")
    tokenizer_config = build_config(TokenizerConfig, config.tokenizer, "tokenizer")
    if config.checkpoint.adopt_model and config.checkpoint.init_from is not None:
        tokenizer_config = replace(tokenizer_config, path=str(find_checkpoint(config.checkpoint.init_from)))

    def prepared(is_main: bool) -> tuple[Path, TrainingData]:
        path = ensure_tokenizer(tokenizer_config, data_config, config.cache_path)
        return path, prepare(data_config, path, config.cache_path, is_main=is_main, progress=is_main)

    def first() -> tuple[Path, TrainingData] | None:
        if not _is_main():
            return None
        with run_directory.preparing(config.cache_path):
            return prepared(True)

    built = ranks.agree(first)
    return ranks.agree(lambda: built or prepared(False))


def _build_model(config: Config, tokenizer: Tokenizer) -> DecoderLM:
    """The initial model, with the same weights on every rank."""
    _seed(config.seed)
    model_config = _model_config(config, tokenizer.vocab_size)
    check_length(config, model_config)
    model = DecoderLM(model_config)
    if config.checkpoint.init_from is not None:
        init_from(model, config.checkpoint.init_from, tokenizer)
    return model


def _model_config(config: Config, vocab_size: int) -> DecoderConfig:
    if config.checkpoint.adopt_model and config.checkpoint.init_from is not None:
        return adopted_model(config.checkpoint.init_from, config.model.get("attention_impl", "auto"))
    return config.model_config(vocab_size)


def _resume(
    config: Config, engine: TrainingEngine, checkpoints: Checkpoints, data: TrainingData
) -> tuple[TrainingProgress, bool]:
    """(the progress to begin with, whether it comes from a checkpoint)."""
    options = config.checkpoint
    path = ranks.decide(lambda: find_resume(checkpoints, options.resume, options.fallback))
    if path is None:
        _seed(config.seed + 1 + engine.rank)
        steps = config.train.steps
        decided = config.train.max_minutes is None or (steps is not None and steps <= MEASURED_STEPS)
        return TrainingProgress(total_steps=steps if decided else None, data=data.train.state()), False
    path = checkpoints.choose(path, engine, options.fallback)
    progress = checkpoints.load(engine, path)
    ranks.agree(lambda: check_same_budget(config.train, progress.budget))
    data.train.load(progress.data)
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


def _summarize(run: TrainingRun, reason: str | None) -> None:
    """Writes loss.png and training.json, and prints a summary."""
    config, progress = run.config, run.progress
    records = [r for r in read_metrics(config.run_path / "metrics.jsonl") if r["kind"] == "train"]
    seconds = sorted(r["step_seconds"] for r in records)
    report = Report.start(seed=config.seed)
    report.rows.append(
        {
            "name": config.name,
            "steps": progress.step,
            "complete": reason is None,
            "minutes": progress.seconds / 60,
            # Unknown after an early stop, because the last step was not evaluated.
            "validation_loss": run.validation.loss if reason is None else None,
            "bits_per_byte": run.validation.bits_per_byte if reason is None else None,
            "tokens_per_second": run.tokens_per_step / seconds[len(seconds) // 2] if seconds else 0.0,
            "ranks": run.engine.world,
            "parameters": run.parameters,
            "train_bytes_per_token": run.data.num_train_bytes / run.data.num_train_tokens,
        }
    )
    figure = plot_losses(config.run_path, run.data.num_train_bytes / run.data.num_train_tokens, config.name)
    report.figures.append(figure.name)
    report.print_table()
    # Too large for the printed table:
    report.rows[0] |= {"data": run.data.account, "budget": progress.budget}
    report.write(config.run_path / "training.json")
    if progress.budget is not None and progress.budget["short"] is not None:
        print(f"warning: {progress.budget['short']}")
    if reason == STOP_AT_STEP:
        print(
            f"stopped by {reason}={config.train.stop_at_step} after step {progress.step}; raise it or leave it out to "
            "go on"
        )
    elif reason is not None:
        print(f"stopped by {reason} after step {progress.step}; the same command resumes it")
    print(f"run directory {config.run_path}; attnzoo serve --checkpoint {config.run_path} serves it", flush=True)


def _planned_model(config: Config) -> DecoderConfig:
    """The configuration of the model that `run_training` would build, without preparing data."""
    tokenizer = build_config(TokenizerConfig, config.tokenizer, "tokenizer")
    known = tokenizer.path is None or config.checkpoint.adopt_model
    return _model_config(
        config,
        tokenizer.vocab_size if known else load_tokenizer(user_path(str(tokenizer.path), "tokenizer.path")).vocab_size,
    )


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
