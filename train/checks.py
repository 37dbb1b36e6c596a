"""Checks that `--dry-run` and a run make before anything is prepared, so that errors come at once."""

from train.checkpoint import check_resume
from train.config import Config
from train.data import Batches
from train.metrics import read_metrics
from train.run_directory import check_directories
from train.tasks import Task


def check_run(task: Task) -> None:
    """Raises ValueError if the run could not be carried out: for the run directory's content, if the run may not write
    there, and for what the task finds."""
    config = task.config
    check_directories(config)
    try:
        task.check_target(config.run_path / "export")
    except ValueError as error:
        raise ValueError(f"run_dir: {error}") from None
    check_resume(config.run_path / "checkpoints", config.checkpoint)
    read_metrics(config.run_path / "metrics.jsonl")
    task.check()
    task.check_rows()


def check_batches(config: Config, train: Batches) -> None:
    """Raises ValueError if there is less training data than one global batch."""
    start = train.state()
    train.next(config.train.batch_size, 0, 1)
    train.load(start)
