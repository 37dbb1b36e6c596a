"""The training loop. `train` reads from top to bottom."""

import itertools
import math
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from attnzoo.report import counted
from train.bar import Bar
from train.budget import Evaluations, MeasuredPace, plan_steps
from train.checkpoint import Checkpoints, TrainingProgress
from train.config import Config
from train.engine import TrainingEngine
from train.evaluate import passes, samples, validate, validate_alone
from train.failures import FAILED, AgreedError
from train.limits import MEASURED_STEPS
from train.metrics import MetricsWriter, peak_flops, peak_memory_mib
from train.ranks import decide
from train.schedule import rate
from train.stop import Launcher, StopRequest
from train.tasks import Task
from train.watchdog import Watchdog

UNKNOWN = 10**9
"""The number of steps for the schedule while train.max_minutes is still measuring; warmup does not depend on it."""
STOP_AT_STEP = "train.stop_at_step"


@dataclass
class TrainingRun:
    """The objects and the state of a run. metrics: None on all ranks but rank 0. flops_per_step: None if unknown.
    saved_step: step of the last save. validation: the last evaluation's metrics; empty before the first."""

    engine: TrainingEngine
    checkpoints: Checkpoints
    progress: TrainingProgress
    metrics: MetricsWriter | None
    watchdog: Watchdog
    parameters: int = 0
    flops_per_step: int | None = None
    launcher: Launcher | None = None
    validation: dict[str, float] = field(default_factory=dict)
    saved_step: int = -1
    skips: list[str] = field(default_factory=list)
    """For each of the last steps in a row that made no update: what was not finite."""
    overdue: bool = False
    """Whether a checkpoint is due that waits for a step with an update."""
    returned_to: set[str] = field(default_factory=set)
    started: float = field(default_factory=time.monotonic)
    unrecorded: list[float] = field(default_factory=list)
    """Seconds of each step since the last record of the metrics."""

    @property
    def task(self) -> Task:
        return self.engine.task

    @property
    def config(self) -> Config:
        return self.task.config

    @property
    def units_per_step(self) -> int:
        """Tokens, stays or what else the task counts, of a step on all ranks."""
        return self.config.train.batch_size * self.task.units_per_row


@dataclass
class StepResult:
    """One finished step. loss: mean over the targets of the global batch. gradient_norm: before clipping; if it is not
    finite, the step made no update. factor: of the learning rate. stop: whether any rank was asked to stop.
    """

    loss: float
    gradient_norm: float
    factor: float
    seconds: float
    stop: bool


def train(run: TrainingRun) -> str | None:
    """Trains to the last step or to a stop. Returns why it stopped early, or None if training is complete.

    Raises AgreedError without saving if the model is no longer finite.
    """
    progress, config = run.progress, run.config
    reason = STOP_AT_STEP if _at_its_stop(run) else None
    with StopRequest(run.launcher) as stop, _bar(run) as bar:
        if reason is None and _missed(run) and not evaluate(run, stop):
            reason = _signal(stop)
        while reason is None and (progress.total_steps is None or progress.step < progress.total_steps):
            with run.watchdog.phase("step"):
                step = take_step(run, stop)
            fix_total_steps(run)
            report(run, step, bar)
            if len(run.skips) >= config.train.non_finite_steps and not step.stop:
                give_up_or_go_back(run)
                continue
            reason = _after_step(run, stop, step)
        if reason is None and not evaluate(run, stop, whole=True):
            reason = _signal(stop)
        if reason is None and not math.isfinite(run.validation["loss"]):
            loss = run.validation["loss"]
            raise AgreedError(FAILED, f"the validation loss of the last step is {loss}: {_nothing(run)}")
        if run.saved_step != progress.step:
            if run.skips:
                raise AgreedError(FAILED, f"the last step was not finite ({run.skips[-1]}): {_nothing(run)}")
            save(run)
    return reason


def _after_step(run: TrainingRun, stop: StopRequest, step: StepResult) -> str | None:
    """Runs the evaluation, samples and checkpoint that are due after a step. Returns why the run stops, or None."""
    progress, config = run.progress, run.config
    if step.stop:
        return _signal(stop)
    if _due(config.eval.every, progress.step) and progress.step != progress.total_steps and not evaluate(run, stop):
        return _signal(stop)
    if _due(config.sample.every, progress.step):
        write_samples(run)
    if progress.step == config.train.stop_at_step:
        return STOP_AT_STEP
    if _due(config.checkpoint.every, progress.step) or run.overdue:
        run.overdue = bool(run.skips)  # a model that may be broken must not replace a good checkpoint
        if not run.overdue:
            save(run)
            if _stopping(run, stop):
                return _signal(stop)
    return None


def _missed(run: TrainingRun) -> bool:
    """Whether the evaluation of the step where the run begins is due: at step 0, or because a signal came before it."""
    progress = run.progress
    due = _due(run.config.eval.every, progress.step) and progress.evaluated != progress.step
    return due and progress.step != progress.total_steps


def _at_its_stop(run: TrainingRun) -> bool:
    """Whether a resumed run has reached train.stop_at_step already, before its last step."""
    progress, stop = run.progress, run.config.train.stop_at_step
    return stop is not None and stop <= progress.step != progress.total_steps


def _stopping(run: TrainingRun, stop: StopRequest) -> bool:
    """Whether any rank was asked to stop; the same answer on every rank."""
    return run.engine.sum(float(stop.requested()))[0] > 0


def _signal(stop: StopRequest) -> str:
    return stop.signal or "a signal to another rank"


def take_step(run: TrainingRun, stop: StopRequest) -> StepResult:
    """One step: forward and backward over this rank's part of the global batch, and an update if all is finite."""
    engine, config, progress = run.engine, run.config, run.progress
    begin = time.perf_counter()
    batch = run.task.train.next(config.train.batch_size // engine.world, engine.rank, engine.world)
    size = config.train.micro_batch_size
    (targets,) = engine.sum(float(run.task.count(batch)))
    losses = [
        engine.forward_backward(tuple(tensor[i : i + size] for tensor in batch), targets)
        for i in range(0, len(batch[0]), size)
    ]
    factor = rate(config.schedule, progress.step, progress.total_steps or UNKNOWN)
    loss, found = float(sum(losses)) / len(losses), engine.non_finite_gradients()
    # One sum over the ranks averages the loss and tells every rank whether to stop and whether to skip the update.
    broken = float(bool(found) or not math.isfinite(loss))
    total, stopping, skip = engine.sum(loss, float(stop.requested()), broken)
    gradient_norm = engine.step(factor, skip=skip > 0)
    progress.step += 1
    progress.validation = None
    progress.data = run.task.train.state()
    note_skip(run, loss, found, gradient_norm)
    seconds = time.perf_counter() - begin
    if progress.total_steps is None:
        progress.step_seconds.append(seconds)
    return StepResult(total / engine.world, gradient_norm, factor, seconds, stopping > 0)


def note_skip(run: TrainingRun, loss: float, found: list[str], gradient_norm: float) -> None:
    """Counts a step without an update, and reports which rank and tensor were not finite."""
    if math.isfinite(gradient_norm):
        run.skips.clear()
        return
    run.progress.skipped += 1
    run.skips.append(run.engine.describe_skip(run.progress.step, loss, found))
    if run.metrics is not None:
        tqdm.write(f"train: skipped {run.skips[-1]}", file=sys.stderr)


def give_up_or_go_back(run: TrainingRun) -> None:
    """Ends the run, or loads the latest checkpoint and goes on with the data after the present step.

    Raises AgreedError to end the run, also if it has gone back to that checkpoint before.
    """
    what = f"{len(run.skips)} steps in a row without an update (train.non_finite_steps), the last one: {run.skips[-1]}"
    path = decide(run.checkpoints.latest)
    if run.config.train.non_finite == "stop":
        raise AgreedError(FAILED, f"{what}; {_nothing(run)}")
    if path is None or path.name in run.returned_to:
        again = "there is no checkpoint to go back to" if path is None else f"going back to {path.name} did not help"
        raise AgreedError(FAILED, f"{what}; {again}; {_nothing(run)}")
    run.returned_to.add(path.name)
    with run.watchdog.phase("load"):
        before = run.checkpoints.load(run.engine, run.checkpoints.choose(path, run.engine, fallback=False))
    progress, seconds = run.progress, elapsed(run)
    progress.step, progress.total_steps, run.saved_step = before.step, before.total_steps, before.step
    progress.seconds, run.started = seconds, time.monotonic()
    run.skips.clear()
    if run.metrics is not None:
        run.metrics.rewind(progress.step)
        tqdm.write(f"train: {what}; going back to {path.name}, past the data since then", file=sys.stderr)


def _nothing(run: TrainingRun) -> str:
    kept = run.checkpoints.newest_name()
    there = f"the newest checkpoint is {kept}" if kept is not None else "there is no checkpoint yet"
    back = ", or let it go back by itself with train.non_finite=go_back"
    return f"nothing is saved or exported, {there}. Lower optim.lr, or look at the data and at the variant" + (
        back if run.config.train.non_finite == "stop" else ""
    )


def fix_total_steps(run: TrainingRun) -> None:
    """Turns train.max_minutes into a number of steps after MEASURED_STEPS steps, the same on every rank.

    The number is kept in checkpoints, so that the schedule (and a resumed run) does not depend on later changes in
    speed. The price is that a machine that slows down later exceeds the budget.
    """
    progress, config, engine = run.progress, run.config, run.engine
    if progress.total_steps is not None or progress.step < MEASURED_STEPS:
        return
    size, every = config.eval.batch_size, config.eval.every
    share = max(1.0, size / config.train.micro_batch_size) / engine.accumulation
    rows = len(run.task.validation()[0])
    some = rows if config.eval.max_blocks is None else min(config.eval.max_blocks, rows)
    evaluations = Evaluations(
        every=every,
        passes=passes(some, size, engine.world),
        last_passes=passes(rows, size, engine.world),
        share=share,
    )
    pace = MeasuredPace(
        steps=progress.step_seconds,
        one_pass=progress.pass_seconds,
        first_evaluation=progress.evaluation_seconds,
        elapsed=elapsed(run),
    )
    budget = plan_steps(config.train, config.schedule.warmup_steps, pace, evaluations)
    progress.budget = engine.from_main(budget.to_dict())
    progress.total_steps = progress.budget["steps"]
    progress.step_seconds = []
    if run.metrics is not None and budget.short is not None:
        tqdm.write(f"train: warning: {budget.short}", file=sys.stderr)


def evaluate(run: TrainingRun, stop: StopRequest, whole: bool = False) -> bool:
    """Measures the task's metrics on the validation data, all of it with `whole`, and writes them to the metrics file.

    Returns False without a result if a rank was asked to stop meanwhile. A result from the checkpoint is not measured
    again.
    """
    progress, config = run.progress, run.config.eval
    if whole and progress.validation is not None:
        run.validation = progress.validation
        return True
    marks = [time.perf_counter()]
    most = None if whole else config.max_blocks

    def go_on() -> bool:
        marks.append(time.perf_counter())
        bar.update()
        return not _stopping(run, stop)

    with run.watchdog.phase("evaluate"), _evaluation_bar(run, most) as bar:
        found = validate(run.engine, config.batch_size, most, go_on)
    if found is None:
        return False
    run.validation, progress.evaluated = found, progress.step
    if progress.step:  # initial weights are no result
        run.checkpoints.best.offer(run.engine, progress.step, run.task.score(found))
    progress.evaluation_seconds = time.perf_counter() - marks[0]
    progress.pass_seconds = statistics.median(after - before for before, after in itertools.pairwise(marks))
    if whole and math.isfinite(found["loss"]):
        progress.validation, run.saved_step = found, -1
    if run.metrics is not None:
        run.metrics.write("eval", progress.step, {**found, "seconds": progress.evaluation_seconds})
        tqdm.write(f"step {progress.step}: validation {_told(found)}")
    return True


def measure_selected(run: TrainingRun) -> dict[str, float]:
    """The metrics of the mean of the best weights, which the export takes. Rank 0 alone."""
    best, progress = run.checkpoints.best, run.progress
    model = run.task.rebuilt(run.engine.model, best.mean())
    found = validate_alone(run.task, model, run.config.eval.batch_size)
    steps = [int(step) for step, _ in best.scores]
    if run.metrics is not None:
        run.metrics.write("selected", progress.step, found)
    tqdm.write(f"the export is the mean of the weights after steps {', '.join(map(str, steps))}: {_told(found)}")
    return found


def _told(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:z.4f}" for name, value in metrics.items())


def write_samples(run: TrainingRun) -> None:
    """Writes text samples to samples.txt, and prints the first one."""
    with run.watchdog.phase("evaluate"):
        texts = samples(run.engine, seed=run.config.seed + run.progress.step)
    if run.metrics is not None and texts is not None:
        run.metrics.write_samples(run.progress.step, texts)
        tqdm.write(f"step {run.progress.step}: sample {texts[0]!r}")


def report(run: TrainingRun, step: StepResult, bar: Any) -> None:
    """Writes a step's numbers to the metrics and the progress bar."""
    if run.metrics is None:
        return
    bar.total = run.progress.total_steps
    bar.set_postfix(loss=f"{step.loss:.4f}", refresh=False)
    bar.update()
    run.unrecorded.append(step.seconds)
    if run.progress.step % run.config.log.every:
        return
    seconds = statistics.fmean(run.unrecorded)  # a step alone says little: other programs take the processor by turns
    run.unrecorded.clear()
    values = {
        "loss": step.loss,
        "gradient_norm": step.gradient_norm,
        "learning_rate": step.factor * run.config.optim.lr,
        "step_seconds": seconds,
        f"{run.task.UNIT}s_per_second": run.units_per_step / seconds,
        f"{run.task.UNIT}s": run.progress.step * run.units_per_step,
        "peak_memory_mib": peak_memory_mib(),
        "skipped_steps": run.progress.skipped,
    }
    peak = peak_flops(run.config)
    if peak is not None and run.flops_per_step is not None:
        values["mfu"] = run.flops_per_step / seconds / (peak * run.engine.world)
    run.metrics.write("train", run.progress.step, values)


def save(run: TrainingRun) -> None:
    """Saves a checkpoint of the present step."""
    run.progress.seconds, run.started = elapsed(run), time.monotonic()
    with run.watchdog.phase("save"):
        run.checkpoints.save(run.engine, run.progress)
    run.saved_step = run.progress.step


def elapsed(run: TrainingRun) -> float:
    """Seconds since the model was built, with evaluations, checkpoints and the export, and those before restarts."""
    return run.progress.seconds + time.monotonic() - run.started


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _bar(run: TrainingRun) -> Any:
    return Bar(
        initial=run.progress.step,
        total=run.progress.total_steps,
        desc=run.config.name,
        unit="step",
        disable=not _shows_progress(run),
        dynamic_ncols=True,
    )


def _evaluation_bar(run: TrainingRun, most: int | None) -> Any:
    """Passes of an evaluation over `most` rows (None: all of them), on a terminal and while it runs."""
    shown = _shows_progress(run)
    rows = len(run.task.validation(most)[0]) if shown else 0
    if shown and most is None:
        tqdm.write(
            f"{run.config.name}: measuring on all {counted(rows, f'validation {run.task.ROW}')}", file=sys.stderr
        )
    return Bar(
        total=passes(rows, run.config.eval.batch_size, run.engine.world),
        desc="validation",
        unit="pass",
        leave=False,
        disable=not shown or not sys.stderr.isatty(),
        dynamic_ncols=True,
    )


def _shows_progress(run: TrainingRun) -> bool:
    return run.metrics is not None and run.config.log.progress
