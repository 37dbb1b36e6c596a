"""The page at /patients in a browser, and its picture in the documents.

    python -m tests.helpers.patients_page docs/patients.png
    python -m tests.helpers.patients_page docs/patients-words.png words

The first picture's model learns for a minute from stays that are made up from the table of the page's own example, the
second's from texts of a few words, so that neither a model nor a patient has anything of a data set.
"""

import json
import math
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from attnzoo.clinical.variables import PHYSIONET2012
from serve.clinical import page
from serve.clinical.loading import load_clinic
from serve.config import ServeConfig
from serve.openai.routes import build_app
from tests.helpers.browser import Browser, browser
from tests.helpers.clinical_notes import export_notes
from tests.helpers.http_server import serving
from tests.helpers.training import ROOT, command, finish

HOURS = 48
CONVERSATION = """\
Doctor: how are you today?
Patient: I am well, doctor. And you?
Doctor: fine, and today I am well. How are you and penicillin?
Patient: I am fine today, doctor. And penicillin? A rash, and the rash is well today."""
EVIL = "</script><img src=x onerror=window.hurt=1>"
WHOLE = "document.querySelector('#result').dataset.whole === 'true' && !document.querySelector('#ask').open"
"""Holds while a whole reply is shown."""
CONFIG = """\
base: {base}
name: made-up-mortality
run_dir: {run}
cache_dir: {cache}
task: {{validation: 0.3}}
data: {{path: {data}}}
model: {{model_dim: 16, num_heads: 2, mlp_dim: 32, dropout: 0.1, hide_variables: 0.1, hide_hours: 0.2}}
optim: {{lr: 0.003}}
schedule: {{warmup_steps: 10}}
train: {{steps: 40, batch_size: 32, micro_batch_size: 32, threads: 1}}
eval: {{every: 10, keep_best: 3}}
log: {{progress: false, tensorboard: false}}
checkpoint: {{every: null}}
"""


def write_stays(directory: Path, stays: int) -> Path:
    """Stays in the format of PhysioNet 2012, which follow the lines of the page's example to an end that lies anywhere
    between its two; the worse it is, the likelier the death."""
    courses = json.loads((page.DIRECTORY / "example.json").read_text())["courses"]
    drawn, outcomes = random.Random(0), ["RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death"]
    records = directory / "set-a"
    records.mkdir()
    for number in range(1000, 1000 + stays):
        worse, lines = drawn.random(), [f"00:00,RecordID,{number}", f"00:00,Age,{drawn.randint(30, 90)}"]
        rarer = drawn.uniform(1, 3)  # some are measured less than the example
        for name, variable in PHYSIONET2012.items():
            first, bad, good, noise, hours, decimals = courses.get(variable.meaning, [0] * 4 + [HOURS * 9, 0])
            level, hour = drawn.gauss(0, 2 * noise), drawn.uniform(0, min(hours, 3)) if hours < HOURS * 9 else HOURS
            while hour < HOURS:
                end = good + (bad - good) * worse
                value = first + level + (end - first) * hour / HOURS + drawn.gauss(0, 2 * noise)
                value = min(max(value, variable.plausible[0]), variable.plausible[1])
                lines.append(f"{int(hour):02d}:{int(hour % 1 * 60):02d},{name},{value:.{decimals}f}")
                hour += hours * rarer * drawn.uniform(0.8, 1.2)
        died = int(drawn.random() < 1 / (1 + math.exp(9 * (0.75 - worse))))
        outcomes.append(f"{number},6,1,5,-1,{died}")
        (records / f"{number}.txt").write_text("\n".join(["Time,Parameter,Value", *sorted(lines)]) + "\n")
    (directory / "Outcomes-a.txt").write_text("\n".join(outcomes) + "\n")
    return records


def trained(directory: Path, stays: int = 500) -> Path:
    """A run on such stays."""
    names = {"base": ROOT / "configs" / "tscan-mortality.yaml", "run": directory / "made-up-mortality"}
    text = CONFIG.format(**names, cache=directory / "cache", data=write_stays(directory, stays))
    (directory / "made-up.yaml").write_text(text, encoding="utf-8")
    finish(command(directory / "made-up.yaml", ranks=1))
    return names["run"]


def visit(shown: Browser, url: str, width: int = 1280, height: int = 900) -> None:
    """Opens the page and waits until it knows the server's model."""
    shown.open(f"{url}/patients", width, height)
    shown.wait("!document.querySelector('#example').disabled")


@contextmanager
def alone(seen: Browser, url: str) -> Iterator[None]:
    """The page is open, asks nobody but this server, and nothing of it is refused or thrown while the block lasts."""
    seen.requests.clear()
    seen.problems.clear()
    visit(seen, url)
    yield
    assert {each.partition("/")[0] + "//" + each.split("/")[2] for each in seen.requests} == {url}
    assert not seen.problems
    assert seen.value("window.hurt") is None


def paste(shown: Browser, content: Any) -> None:
    """Puts a request into the page: a text, or what JSON makes of anything else."""
    shown.value("document.querySelector('#ask').open = true; document.querySelector('#request').value = ''")
    shown.value("document.querySelector('#request').focus()")
    shown.call("Input.insertText", text=content if isinstance(content, str) else json.dumps(content))


def predict(shown: Browser, content: Any) -> None:
    """Asks for the prediction of a request, and waits until it is shown."""
    paste(shown, content)
    shown.click("#send")
    shown.wait(WHOLE)


def answer(url: str, request: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The server's own reply to a request, with more fields."""
    found: dict[str, Any] = httpx.post(f"{url}/v1/predict", json={**request, **fields}, timeout=30).json()
    return found


def channels(colour: str) -> list[int]:
    """The numbers of a CSS colour."""
    return [int(each) for each in re.findall(r"\d+", colour)]


def contrast(one: list[int], other: list[int]) -> float:
    """WCAG 2's ratio of two colours."""

    def luminance(colour: list[int]) -> float:
        parts = [each / 255 for each in colour[:3]]
        red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def ask(shown: Browser, button: str = "#example") -> None:
    """Asks for the example's prediction, and waits until it is shown."""
    shown.click(button)
    shown.click("#send")
    shown.wait(WHOLE)


@contextmanager
def showing(model: Path, height: int) -> Iterator[Browser]:
    """The page of a run's model."""
    with browser() as shown:
        config = ServeConfig(checkpoint=str(model))
        with serving(build_app(None, config, load_clinic(config))) as url:
            visit(shown, url, 1280, height)
            yield shown


def picture_of_hours(path: Path, directory: Path) -> None:
    """A patient's risk by hour, and what moved it."""
    with showing(trained(directory), 1840) as shown:
        ask(shown)
        shown.hover("#heat tbody tr td.measured:nth-child(n+34)")
        shown.picture(path)


def picture_of_words(path: Path, directory: Path) -> None:
    """A conversation, and what its words are to a label."""
    with showing(export_notes(directory, None, "task.longest=64", "task.explained=8", steps=60), 860) as shown:
        predict(shown, {"patients": [{"id": "made-up", "text": CONVERSATION}]})
        shown.hover("#words mark")
        shown.picture(path)


PICTURES = {"hours": picture_of_hours, "words": picture_of_words}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="attnzoo-patients-") as where:
        PICTURES[sys.argv[2] if len(sys.argv) > 2 else "hours"](Path(sys.argv[1]), Path(where))
