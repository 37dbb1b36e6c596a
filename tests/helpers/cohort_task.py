"""Tasks on cohorts that are in memory, ready to train."""

from collections.abc import Iterable
from typing import TypeVar

from attnzoo.clinical.cohort import Cohort
from train.config_reader import load_config
from train.tasks import build_task
from train.tasks.cohort import CohortTask

T = TypeVar("T", bound=CohortTask)


def prepared_task(kind: type[T], config: str, cohort: Cohort, words: Iterable[str]) -> T:
    """A configuration's task on a cohort. Of two words for one key the last counts."""
    given = dict(word.split("=", 1) for word in words)
    task = build_task(load_config(config, [f"{key}={value}" for key, value in given.items()]))
    assert isinstance(task, kind)
    task.cohort = cohort
    task.check()
    task.prepare(is_main=True)
    return task
