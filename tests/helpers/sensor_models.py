"""A small sensor adapter in front of a small language model that can chat, and requests with sensor data."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from attnzoo.checkpoint import save_model
from attnzoo.checkpoint.frozen import FrozenLM
from attnzoo.clinical.cohort import Cohort
from attnzoo.clinical.grid import Grid
from attnzoo.clinical.sensors import SensorQuestions, SensorStatistics, number_names
from attnzoo.clinical.trained_sensors import TrainedSensors, save_sensors
from attnzoo.models import SensorAdapter, SensorConfig
from attnzoo.tokenizer.convert import to_huggingface
from tests.helpers.serving import chat_tokenizer, small_model

SENSORS = ("resting_heart_rate", "sleep_minutes", "sleep_efficiency")
UNITS = {"resting_heart_rate": "/min", "sleep_minutes": "min", "sleep_efficiency": "%"}
DAYS, TOKENS = 4, 3
VALUES: dict[str, list[float | None]] = {
    "resting_heart_rate": [58, 61, None, 55.5],
    "sleep_minutes": [402, 388, 431, None],
    "sleep_efficiency": [None, 93, 90, 95],
}


def language_model(directory: Path, kind: str = "rcmha", max_len: int = 256) -> Path:
    """A checkpoint with a chat template."""
    words = to_huggingface(chat_tokenizer())  # type: ignore[arg-type]
    return save_model(directory, small_model(kind, max_len=max_len), tokenizer=words)


def adapter_of(frozen: FrozenLM) -> TrainedSensors:
    """Random weights, of tokens that matter as much as words do."""
    torch.manual_seed(4)
    config = SensorConfig(numbers=2 * len(SENSORS), width=frozen.model.config.model_dim, tokens=TOKENS, hidden=7)
    statistics = SensorStatistics(
        rows=50,
        days=DAYS,
        names=number_names(SENSORS),
        means=(60.0, 12.0, 400.0, 900.0, 92.0, 4.0),
        deviations=(6.0, 9.0, 50.0, 800.0, 3.0, 2.0),
    )
    questions = SensorQuestions(questions={"fatigue": "Tired?"})
    return TrainedSensors(SensorAdapter(config).eval(), frozen, statistics, questions)


def export(directory: Path, checkpoint: Path) -> Path:
    """A run directory with the export of an adapter in front of that checkpoint."""
    save_sensors(directory / "export", adapter_of(FrozenLM.load(str(checkpoint))))
    return directory


def cohort_of(values: dict[str, list[float | None]]) -> Cohort:
    """One row with these days, in the units of the model."""
    values_1TV = np.array([[values.get(name, [None] * DAYS) for name in SENSORS]], np.float32).transpose(0, 2, 1)
    counts_1TV = (~np.isnan(values_1TV)).astype(np.uint8)
    return Cohort(
        name="by hand",
        grid=Grid(values_1TV, counts_1TV, np.array([DAYS]), SENSORS, step_hours=24),
        statics_NS=np.zeros((1, 0), np.float32),
        statics=(),
        stay_ids=("1",),
        patient_ids=None,
        labels={},
    )


def sensor_part(values: dict[str, list[float | None]] | None = None, **units: str) -> dict[str, Any]:
    """A content part. units: of sensors that are given in another than the model's."""
    channels = [
        {"variable": name, "unit": units.get(name, UNITS[name]), "values": days}
        for name, days in (VALUES if values is None else values).items()
    ]
    return {"type": "sensor_data", "sensor_data": {"channels": channels}}


def message(*parts: str | dict[str, Any]) -> dict[str, Any]:
    """A user's message of texts and parts."""
    found = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": found}
