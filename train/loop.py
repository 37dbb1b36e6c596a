"""The training loop. `train` reads from top to bottom."""

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from attnzoo.tokenizer import Tokenizer
from train.checkpoint import Checkpoints, Progress
from train.config import Config
from train.data import IGNORED, TrainingData
from train.engine import Engine
from train.evaluate import UNMEASURED, Validation, samples, validate
from train.limits import MEASURED_STEPS
from train.metrics import Metrics, peak_flops, peak_memory_mib
from train.schedule import rate
from train.stop import StopRequest

UNKNOWN = 10**9
"""Stands for the number of steps while `train.max_minutes` still measures: the warmup does not depend on it."""


@dataclass
class Run:
    """Everything a step needs. `metrics` is None on all ranks but the first."""

    config: Config
    engine: Engine
    data: TrainingData
    tokenizer: Tokenizer
    checkpoints: Checkpoints
    progress: Progress
    metrics: Metrics | None
    parameters: int
    flops_per_step: int
    validation: Validation = UNMEASURED
    saved_step: int = -1
    step_seconds: list[float] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.batch_size * self.data.sequence_length


@dataclass
class Step:
    """One finished step: mean loss over the global batch in nats, gradient norm, rate factor, wall time."""

    loss: float
    gradient_norm: float
    factor: float
    seconds: float
    stop: bool


def train(run: Run) -> str | None:
    """Trains to the last step, or to a stop; returns why it stopped early, or None when training is complete."""
    progress, config = run.progress, run.config
    reason = None
    with StopRequest() as stop, _bar(run) as bar:
        if progress.step == 0 and config.eval.every:
            evaluate(run)
        while progress.total_steps is None or progress.step < progress.total_steps:
            step = take_step(run, stop)
            fix_total_steps(run)
            report(run, step, bar)
            if _due(config.eval.every, progress.step) and progress.step != progress.total_steps:
                evaluate(run)
            if _due(config.sample.every, progress.step):
                write_samples(run)
            if step.stop:
                reason = stop.signal or "a signal to another rank"
                break
            if progress.step == config.train.stop_at_step:
                reason = "train.stop_at_step"
                break
            if _due(config.checkpoint.every, progress.step):
                save(run)
        if reason is None:
            evaluate(run, whole=True)
        if run.saved_step != progress.step:
            save(run)
    return reason


def take_step(run: Run, stop: StopRequest) -> Step:
    """Forward and backward over this rank's part of the global batch, and one update."""
    engine, config, progress = run.engine, run.config, run.progress
    begin = time.perf_counter()
    tokens_BT, targets_BT = run.data.train.next(config.train.batch_size // engine.world, engine.rank, engine.world)
    size = config.train.micro_batch_size
    (targets,) = engine.sum(float((targets_BT != IGNORED).sum()))
    losses = [
        engine.forward_backward(tokens_BT[i : i + size], targets_BT[i : i + size], targets)
        for i in range(0, len(tokens_BT), size)
    ]
    factor = rate(config.schedule, progress.step, progress.total_steps or UNKNOWN)
    gradient_norm = engine.step(factor)
    # The ranks agree on stopping by the same small sum that averages the loss.
    total, stopping = engine.sum(float(sum(losses)) / len(losses), float(stop.requested()))
    seconds = time.perf_counter() - begin
    progress.step += 1
    progress.data = run.data.train.state()
    run.step_seconds.append(seconds)
    return Step(total / engine.world, gradient_norm, factor, seconds, stopping > 0)


def fix_total_steps(run: Run) -> None:
    """Turns train.max_minutes into a number of steps once MEASURED_STEPS are done, the same on every rank.

    A fixed number, kept in the checkpoint, makes the schedule (and so a resumed run) independent of later changes
    in speed; the price is that a machine that slows down after the measurement overruns the budget.
    """
    progress, config = run.progress, run.config
    if progress.total_steps is not None or progress.step < MEASURED_STEPS:
        return
    assert config.train.max_minutes is not None
    left = config.train.max_minutes * 60 - _elapsed(run)
    # The first steps warm caches up; half of the measured ones are enough for a median.
    cost = statistics.median(run.step_seconds[len(run.step_seconds) // 2 :])
    left -= progress.evaluation_seconds  # the last one
    if config.eval.every:
        cost += progress.evaluation_seconds / config.eval.every
    total = progress.step + max(int(left / cost), 1)
    if config.train.steps is not None:
        total = min(total, config.train.steps)
    progress.total_steps = run.engine.from_main(total)


def evaluate(run: Run, whole: bool = False) -> None:
    """Validation loss and bits per byte, into the metrics; over all blocks with `whole`."""
    begin, config = time.perf_counter(), run.config.eval
    run.validation = validate(run.engine, run.data, config.batch_size, None if whole else config.max_blocks)
    run.progress.evaluation_seconds = time.perf_counter() - begin
    if run.metrics is not None:
        values = {**run.validation._asdict(), "seconds": run.progress.evaluation_seconds}
        run.metrics.write("eval", run.progress.step, values)
        loss, bits = run.validation
        tqdm.write(f"step {run.progress.step}: validation {loss:.4f} nats, {bits:.4f} bits per byte")


def write_samples(run: Run) -> None:
    """Text samples into samples.txt, the first one on the screen too."""
    texts = samples(run.engine, run.tokenizer, run.config.sample, seed=run.config.seed + run.progress.step)
    if run.metrics is not None and texts is not None:
        run.metrics.write_samples(run.progress.step, texts)
        tqdm.write(f"step {run.progress.step}: sample {texts[0]!r}")


def report(run: Run, step: Step, bar: Any) -> None:
    """The step's numbers into the metrics and the progress bar."""
    if run.metrics is None:
        return
    bar.total = run.progress.total_steps
    bar.set_postfix(loss=f"{step.loss:.4f}", refresh=False)
    bar.update()
    if run.progress.step % run.config.log.every:
        return
    values = {
        "loss": step.loss,
        "gradient_norm": step.gradient_norm,
        "learning_rate": step.factor * run.config.optim.lr,
        "step_seconds": step.seconds,
        "tokens_per_second": run.tokens_per_step / step.seconds,
        "tokens": run.progress.step * run.tokens_per_step,
        "peak_memory_mib": peak_memory_mib(),
    }
    peak = peak_flops(run.config)
    if peak is not None:
        values["mfu"] = run.flops_per_step / step.seconds / (peak * run.engine.world)
    run.metrics.write("train", run.progress.step, values)


def save(run: Run) -> None:
    """A checkpoint of this moment."""
    run.progress.seconds, run.started = _elapsed(run), time.monotonic()
    run.checkpoints.save(run.engine, run.progress)
    run.saved_step = run.progress.step


def _elapsed(run: Run) -> float:
    """Seconds of training, over all restarts."""
    return run.progress.seconds + time.monotonic() - run.started


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _bar(run: Run) -> Any:
    return tqdm(
        initial=run.progress.step,
        total=run.progress.total_steps,
        desc=run.config.name,
        unit="step",
        disable=run.metrics is None or not run.config.log.progress,
        dynamic_ncols=True,
    )
