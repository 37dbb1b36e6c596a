"""Exports of small models of texts, as their task writes them, and requests to them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attnzoo.clinical.cohort import Cohort
from tests.helpers.clinical_texts import text_cohort
from tests.helpers.cohort_task import prepared_task
from train.tasks import LdamTask

NAME = "notes"
SMALL = ("model.model_dim=16", "task.least=1", "task.validation=0.3", "model.dropout=0.1", "model.skip=false")


def named_texts(rows: int = 240) -> Cohort:
    """Texts that have a name each, which no other text has: a word that a model knows of training rows alone. One in
    eight has the label of another text, so that nothing is certain."""
    cohort = text_cohort(rows)
    assert cohort.texts is not None
    names = (f"q{row:b}".replace("0", "a").replace("1", "b") for row in range(rows))
    is_wrong_N = np.arange(rows) % 8 == 5
    labels = {name: np.where(is_wrong_N, np.roll(label_N, 1), label_N) for name, label_N in cohort.labels.items()}
    texts = tuple(f"{text} {name}" for text, name in zip(cohort.texts, names, strict=True))
    return replace(cohort, texts=texts, labels=labels)


def export_notes(directory: Path, cohort: Cohort | None = None, *words: str, steps: int = 0) -> Path:
    """The run directory, called `NAME`, of a model that has learned for so many steps. words: overrides."""
    torch.manual_seed(0)
    task = prepared_task(LdamTask, "ldam-sections.yaml", cohort or named_texts(), [*SMALL, *words])
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        task.loss(model, task.train.next(32, 0, 1), torch.tensor(32.0)).backward()
        optimizer.step()
    task.save(directory / NAME / "export", model.eval(), {"steps": steps})
    return directory / NAME


def notes_request(*texts: str, **fields: Any) -> dict[str, Any]:
    """A request for patients p0, p1, ... with these texts."""
    patients = [{"id": f"p{row}", "text": text} for row, text in enumerate(texts)]
    return {"model": NAME, "patients": patients, **fields}
