"""Checks the values of a configuration, one by one and in combination."""

import math
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from attnzoo.errors import suggest
from attnzoo.files import user_path
from train.config import Config, EvalConfig
from train.ngram import HIGHEST_ORDER

MEASURED_STEPS = 20
"""Steps after which `train.max_minutes` is turned into a number of steps."""

CHOICES = {
    "precision": ("fp32", "bf16", "bf16_autocast"),
    "optim.name": ("adamw", "muon"),
    "schedule.kind": ("cosine", "wsd", "constant"),
    "train.non_finite": ("stop", "go_back"),
    "zero.stage": (0, 1, 2, 3),
}
AT_LEAST_ONE = [
    "train.steps",
    "train.min_steps",
    "train.stop_at_step",
    "train.batch_size",
    "train.micro_batch_size",
    "train.threads",
    "train.non_finite_steps",
    "eval.every",
    "eval.batch_size",
    "eval.max_blocks",
    "eval.keep_best",
    "sample.every",
    "sample.max_new_tokens",
    "log.every",
    "checkpoint.every",
    "checkpoint.keep",
    "optim.newton_schulz_steps",
    "lora.rank",
]
POSITIVE = [
    "train.max_minutes",
    "optim.lr",
    "optim.muon_lr",
    "optim.eps",
    "log.peak_flops",
    "lora.alpha",
    "sample.top_p",
]
POSITIVE += [f"watchdog.{phase}" for phase in ("start", "data", "load", "step", "evaluate", "save", "stop")]
NOT_NEGATIVE = ["optim.weight_decay", "schedule.warmup_steps", "train.gradient_clipping", "sample.temperature"]
FRACTIONS = [
    "schedule.decay_fraction",
    "schedule.final_fraction",
    "sample.top_p",
]
BELOW_ONE = ["optim.beta1", "optim.beta2", "optim.momentum", "lora.dropout"]
"""Must be below 1: at 1 a moving average would never change, and AdamW would divide by zero."""


NAME = re.compile(r"\w([\w.+=@-]*[\w+=@-])?\Z")
LARGEST_SEED, LARGEST = 2**32 - 1, 2**63 - 1


def _names(config: Config) -> Iterator[tuple[str, str]]:
    """Problems of `name`, which names a directory, and of the directories that are set."""
    if not NAME.match(config.name) or len(config.name) > 100:
        yield (
            "name",
            f"name={config.name!r} must be the name of a directory: at most 100 letters, digits and . _ - + = @, "
            "with a letter or digit first; set run_dir to write to another place",
        )
    for key in ("run_dir", "cache_dir"):
        if getattr(config, key) == "":
            yield key, f"{key} is empty; give a directory, or null for the default"
        elif getattr(config, key) is not None:
            try:
                user_path(getattr(config, key), key)
            except ValueError as error:
                yield key, str(error)


def _extremes(config: Config) -> Iterator[tuple[str, str]]:
    """Problems of numbers that are not finite or exceed 64 bits, and of seeds that numpy refuses."""
    if not 0 <= config.seed <= LARGEST_SEED:
        yield "seed", f"seed={config.seed} must be between 0 and {LARGEST_SEED}"
    for section in fields(config):
        value = getattr(config, section.name)
        for field in fields(value) if is_dataclass(value) else ():
            key, number = f"{section.name}.{field.name}", getattr(value, field.name)
            if isinstance(number, float) and not math.isfinite(number):
                yield key, f"{key}={number} is not a finite number"
            if isinstance(number, int) and number > LARGEST:
                yield key, f"{key}={number} must be at most {LARGEST}"


def _evaluations(options: EvalConfig) -> Iterator[tuple[str, str]]:
    """Problems of the section `eval`."""
    if options.keep_best is not None and options.max_blocks is not None:
        yield (
            "eval.keep_best",
            f"eval.keep_best={options.keep_best} compares evaluations on the same rows; set eval.max_blocks=null",
        )
    for order in options.below_ngrams:
        if not 1 <= order <= HIGHEST_ORDER:
            yield "eval.below_ngrams", f"eval.below_ngrams: order {order} must be between 1 and {HIGHEST_ORDER}"


def problems(config: Config) -> Iterator[tuple[str, str]]:
    """Yields (key, message) for every value out of range and every combination that does not work."""

    def get(key: str) -> Any:
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        return value

    for key, known in CHOICES.items():
        if get(key) not in known:
            yield key, f"unknown {key} {get(key)!r}{suggest(str(get(key)), map(str, known))}"
    bounds = ((AT_LEAST_ONE, 1, "at least 1"), (NOT_NEGATIVE, 0, "at least 0"))
    for keys, least, words in bounds:
        yield from ((k, f"{k}={get(k)} must be {words}") for k in keys if get(k) is not None and get(k) < least)
    yield from ((k, f"{k}={get(k)} must be positive") for k in POSITIVE if get(k) is not None and get(k) <= 0)
    yield from ((k, f"{k}={get(k)} must lie in [0, 1]") for k in FRACTIONS if not 0 <= get(k) <= 1)
    yield from ((k, f"{k}={get(k)} must lie in [0, 1)") for k in BELOW_ONE if not 0 <= get(k) < 1)
    yield from _names(config)
    yield from _extremes(config)
    end, stop = config.train.steps, config.train.stop_at_step
    if end is not None and stop is not None and stop > end:
        yield "train.stop_at_step", f"train.stop_at_step={stop} lies beyond the end, train.steps={end}; lower it"
    if config.train.steps is None and config.train.max_minutes is None:
        yield "train", "train.steps and train.max_minutes are both unset: give one, for example train.steps=1000"
    yield from _evaluations(config.eval)
    if config.optim.name == "muon" and config.zero.offload_optimizer:
        yield (
            "zero.offload_optimizer",
            "optim.name=muon needs its matrices on the device; set zero.offload_optimizer=false or optim.name=adamw",
        )
    if config.zero.offload_optimizer and config.zero.stage == 0:
        yield "zero.offload_optimizer", "zero.offload_optimizer needs zero.stage of 1, 2 or 3, not 0"
    if config.checkpoint.adopt_model and config.checkpoint.init_from is None:
        yield "checkpoint.adopt_model", "checkpoint.adopt_model=true needs checkpoint.init_from"
    if config.lora.rank is not None:
        if not config.lora.targets:
            yield "lora.targets", "lora.targets is empty: nothing would train; name linear maps such as query"
        if config.zero.stage == 3:
            yield "zero.stage", "zero.stage=3 does not work with lora.rank: it partitions frozen weights; use 0, 1 or 2"
        if config.optim.name == "muon":
            yield "optim.name", "optim.name=muon does not work with lora.rank: adapters are too narrow; use adamw"
    if config.train.compile and config.zero.stage == 3:
        yield (
            "train.compile",
            "train.compile does not work with zero.stage=3, whose hooks break the graph; use 0, 1 or 2",
        )
    warmup = config.schedule.warmup_steps
    if config.train.max_minutes is not None and warmup < MEASURED_STEPS:
        yield (
            "schedule.warmup_steps",
            f"schedule.warmup_steps={warmup}: train.max_minutes measures the first {MEASURED_STEPS} steps before the "
            f"schedule is fixed, so the warmup must last at least as long",
        )
