"""What a run trains, by `task.kind` of its configuration. `train.tasks.base` says how a task is written."""

from train.config import Config
from train.tasks.base import TASKS, Task
from train.tasks.clinical import ClinicalTask
from train.tasks.clinical_pretraining import ClinicalPretraining
from train.tasks.diffusion import DiffusionTask
from train.tasks.language import LanguageTask
from train.tasks.ldam import LdamTask
from train.tasks.pictures import PictureTask
from train.tasks.sensors import SensorTask


def task_class(config: Config) -> type[Task]:
    """The class for `task.kind`. Raises ValueError for an unknown kind."""
    return TASKS.get(config.task.get("kind", "language"))


def build_task(config: Config) -> Task:
    """The task of a configuration that has been read."""
    return task_class(config)(config)


__all__ = [
    "TASKS",
    "ClinicalPretraining",
    "ClinicalTask",
    "DiffusionTask",
    "LanguageTask",
    "LdamTask",
    "PictureTask",
    "SensorTask",
    "Task",
    "build_task",
    "task_class",
]
