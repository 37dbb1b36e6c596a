"""What hidden blocks of the documents call."""

from pathlib import Path

from attnzoo.checkpoint import save_model
from attnzoo.clinical.cohort import Cohort
from attnzoo.clinical.trained import save_trained
from tests.helpers import clinical_models, clinical_notes, sensor_models, serving
from tests.helpers.clinical_files import write_stays
from train.config_reader import load_config
from train.tasks import build_task


def small_checkpoint(directory: str) -> Path:
    """A small model with random weights where a page speaks of a trained one."""
    return save_model(Path(directory), serving.small_model("rcmha"), tokenizer=serving.tokenizer())


def small_clinical_model(directory: str) -> Path:
    """The same of a clinical one."""
    trained = clinical_models.small_trained(clinical_models.icu_cohort(), judged=0)
    return save_trained(Path(directory) / "export", trained)


def small_clinical_run(directory: str, data: str) -> Path:
    """The same of a run, and the data that it is of, in the format of PhysioNet 2012."""
    write_stays(Path(data).parent, 120)
    words = [f"data.path={data}", "task.explained=0", "model.model_dim=8", "model.num_heads=2", "model.mlp_dim=16"]
    task = build_task(load_config("tscan-mortality.yaml", words))
    task.check()
    task.prepare(is_main=True)
    task.save(Path(directory) / "export", task.model().eval(), {})
    return Path(directory)


def small_notes_model(directory: str) -> Path:
    """The same of a model that reads texts."""
    made = clinical_notes.export_notes(Path(directory).parent / "made", None, steps=20)
    return made.rename(Path(directory))


def small_sensors(directory: str) -> Path:
    """The same of a sensor adapter, with its language model beside it."""
    path = Path(directory).absolute()
    return sensor_models.export(path, sensor_models.language_model(path.parent / "lm"))


def small_days() -> Cohort:
    """A few days of one person."""
    return sensor_models.cohort_of(sensor_models.VALUES)
