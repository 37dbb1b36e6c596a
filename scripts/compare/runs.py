"""Runs of a comparison: trains a variant with one seed, measures the model, and writes a JSON file."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attnzoo.files import write_atomic
from attnzoo.models import DecoderLM
from attnzoo.workers import Tick
from scripts.compare.comparison import Comparison, Run
from scripts.compare.losses import segment_losses, window_losses
from scripts.compare.recall import recall_accuracy, recall_batches
from scripts.compare.text import streams
from scripts.compare.training import train, train_as_published

EXTRAPOLATION = (1, 2, 4)
"""Window lengths for the loss, in multiples of the trained length."""

BLOCKS = 32
"""Number of points in the curve of loss against position."""

Watch = Callable[[int, float], None]
"""Called with (step, validation loss) every `watch_every` steps."""


@dataclass(frozen=True)
class Hooks:
    """Functions that a run calls while it trains: `tick` after each step, `watch` every `watch_every` steps."""

    tick: Tick = lambda: None
    watch: Watch | None = None
    watch_every: int = 50


def run_one(comparison: Comparison, run: Run, directory: Path, hooks: Hooks | None = None) -> dict[str, Any]:
    """The content of a run's file. If the file does not exist, the run is made and the file is written.

    Raises ValueError if the file comes from other settings.
    """
    done = finished(comparison, run, directory)
    if done is not None:
        return done
    torch.set_num_threads(1)  # makes sums reproducible, and keeps parallel workers from slowing each other
    torch.manual_seed(run.seed)
    started = time.perf_counter()
    kinds = {"recall": _recall, "paper": _published}
    results = kinds.get(run.table, _language)(comparison, run, hooks or Hooks())
    content = {
        "settings": comparison.settings(run),
        "results": results,
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_atomic(directory / f"{comparison.name(run)}.json", (json.dumps(content, indent=1) + "\n").encode())
    return content


def finished(comparison: Comparison, run: Run, directory: Path) -> dict[str, Any] | None:
    """The content of a run's file; None if it does not exist. Raises ValueError if its settings differ."""
    path = directory / f"{comparison.name(run)}.json"
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for key, value in comparison.settings(run).items():
        if content["settings"].get(key) != value:
            raise ValueError(
                f"{path} was made with {key}={content['settings'].get(key)}, not {value}: choose another --run-dir, or "
                "remove the file to make the run again"
            )
    return content


def _language(comparison: Comparison, run: Run, hooks: Hooks) -> dict[str, Any]:
    config, text = comparison.config, comparison.text
    model = DecoderLM(comparison.decoder(run.variant, comparison.width(run), config.segment))
    batch, chunk = config.evaluation_batch, config.chunk

    def after_step(step: int) -> None:
        hooks.tick()
        if hooks.watch is not None and step % hooks.watch_every == 0:
            part = text.validation[: 16 * config.segment + 1]
            hooks.watch(step, window_losses(model, part, config.segment, chunk, batch).loss)

    batches = streams(text.train, config.batch_size, config.segment, run.seed)
    train_loss = train(model, batches, config, config.gradient_clip, after_step)
    results: dict[str, Any] = {
        "parameters": model.num_parameters(),
        "epochs": config.steps * config.batch_size * config.segment / len(text.train),
        "train_loss": train_loss,
    }
    losses = window_losses(model, text.validation, config.segment, chunk, batch)
    results |= {"loss": losses.loss, "bits_per_character": losses.bits_per_character, "accuracy": losses.accuracy}
    part = text.validation[: config.extrapolation_chars + 1]
    for times in EXTRAPOLATION:
        length = times * config.segment
        losses = window_losses(model, part, length, chunk, batch)
        results[f"loss_{times}x"] = losses.loss
        results[f"last_{times}x"] = losses.between(length - config.segment, length)
    size = max(1, length // BLOCKS)
    results["positions"] = list(range(size, length + 1, size))
    results["loss_by_position"] = [losses.between(end - size, end) for end in results["positions"]]
    if hooks.watch is not None:
        hooks.watch(config.steps, results["loss"])
    return results


def _published(comparison: Comparison, run: Run, hooks: Hooks) -> dict[str, Any]:
    config, text, paper = comparison.config, comparison.text, comparison.config.paper
    assert run.form is not None
    # Only segment + memory distances are read. Further rows would have no gradient and stay zero, so training leaves
    # them out; they are counted when parameters and memory are measured.
    rows = paper.segment + paper.memory
    model = DecoderLM(comparison.decoder(run.variant, comparison.width(run), rows))
    mixed = train_as_published(model, text, paper, run.form, run.seed, config.gradient_clip, hooks.tick)
    losses = segment_losses(model, text.validation, paper.batch_size, paper.segment, paper.memory, run.form)
    return {
        "parameters": model.num_parameters(),
        "epochs": paper.steps * paper.batch_size * paper.segment / len(text.train),
        "mixed_accuracy": mixed,
        "accuracy": losses.accuracy,
        "bits_per_character": losses.bits_per_character,
        # Through the convolution, the tokens of a segment see different numbers of earlier tokens.
        "loss_by_place": [losses.between(i, i + 1) for i in range(paper.segment)],
    }


def _recall(comparison: Comparison, run: Run, hooks: Hooks) -> dict[str, Any]:
    config = comparison.config
    model = DecoderLM(comparison.recall_decoder(run.variant, comparison.width(run)))
    batches = recall_batches(config.recall, run.seed)
    train_loss = train(model, batches, config.recall, config.gradient_clip, lambda _: hooks.tick())
    accuracy = recall_accuracy(model, config.recall)
    return {"parameters": model.num_parameters(), "train_loss": train_loss, "accuracy": accuracy}
