"""The settings of a comparison: every key of `attnzoo compare key=value ...`."""

import copy
import dataclasses
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from attnzoo.attention import ATTENTION
from attnzoo.errors import suggest
from attnzoo.settings import check_new, parse_word
from attnzoo.tasks.recall import RecallTask
from attnzoo.types import build_config

TABLES = ("parameters", "flops", "recall", "paper")
VARIANTS = ("mha", "rmha", "mdha", "rcmha", "linear")


@dataclass(frozen=True, kw_only=True)
class PaperConfig:
    """The published setting (arXiv 2308.03429, from the authors' code), but with fewer steps.

    segment, memory, batch_size, lr and warmup_steps (Noam's schedule) have the published values. table_rows: length of
    the published position table. steps: the authors take about 157,000 (10 epochs), which are hours on a CPU.
    """

    segment: int = 2
    memory: int = 32
    batch_size: int = 32
    steps: int = 3000
    lr: float = 1.0
    warmup_steps: int = 2000
    table_rows: int = 8192
    seeds: int = 1

    def __post_init__(self) -> None:
        _at_least(self, "paper.", 1, "segment", "memory", "batch_size", "steps", "warmup_steps", "seeds", "table_rows")
        _positive(self, "paper.", "lr")
        if self.table_rows < self.segment + self.memory:
            raise ValueError(
                f"paper.table_rows={self.table_rows} is shorter than paper.memory={self.memory} and "
                f"paper.segment={self.segment} together; the published table has 8192 rows"
            )


@dataclass(frozen=True, kw_only=True)
class RecallConfig(RecallTask):
    """Multi-query associative recall (arXiv 2312.04927) with a small model.

    test_sequences: number of held-out sequences, drawn with another seed. `RecallTask` has the task's other settings.
    """

    model_dim: int = 64
    num_heads: int = 4
    num_layers: int = 2
    mlp_dim: int = 128
    batch_size: int = 64
    steps: int = 400
    lr: float = 3e-3
    warmup_steps: int = 50
    test_sequences: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, "recall.", 1, "model_dim", "num_heads", "num_layers", "mlp_dim", "batch_size")
        _at_least(self, "recall.", 1, "steps", "warmup_steps", "test_sequences")
        _positive(self, "recall.", "lr")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """The settings. Model sizes are the paper's (arXiv 2308.03429), but the text is split and evaluated correctly.

    text: a UTF-8 file, read by characters, or "stdlib", a million characters of Python's standard library; the last
    tenth is for validation. variants: names, each built with num_heads and default options. tables: the runs to make.
    segment: tokens of a training sequence, and rows of a position table. batch_size: parallel streams of text. chunk:
    tokens at a time in validation. validation_chars: characters of the validation part to read (0: all).
    extrapolation_chars: characters that are also read in windows of 1, 2 and 4 segments. lr: peak of a cosine schedule
    that ends at a tenth of it.
    """

    text: str = "stdlib"
    variants: list = field(default_factory=lambda: list(VARIANTS))
    tables: list = field(default_factory=lambda: list(TABLES))
    seeds: int = 3
    model_dim: int = 128
    num_heads: int = 8
    num_layers: int = 6
    mlp_dim: int = 256
    segment: int = 256
    batch_size: int = 4
    steps: int = 1000
    lr: float = 4e-3
    warmup_steps: int = 100
    gradient_clip: float = 1.0
    chunk: int = 64
    validation_chars: int = 0
    extrapolation_chars: int = 32768
    evaluation_batch: int = 16
    paper: PaperConfig = field(default_factory=PaperConfig)
    recall: RecallConfig = field(default_factory=RecallConfig)

    def __post_init__(self) -> None:
        _at_least(self, "", 1, "seeds", "model_dim", "num_heads", "num_layers", "mlp_dim", "batch_size", "steps")
        _at_least(self, "", 2, "segment")
        _at_least(self, "", 1, "warmup_steps", "chunk", "evaluation_batch", "extrapolation_chars")
        _at_least(self, "", 0, "validation_chars")
        _positive(self, "", "lr", "gradient_clip")
        _names("tables", self.tables, TABLES)
        _names("variants", self.variants, ATTENTION.names())

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, which `from_dict` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CompareConfig":
        """Reads a mapping with the sections `paper` and `recall`. Raises ValueError for unknown keys."""
        sections = {"paper": PaperConfig, "recall": RecallConfig}
        built = {
            key: build_config(sections[key], value, key) if key in sections else value for key, value in values.items()
        }
        return build_config(cls, built, "compare")


QUICK: dict[str, Any] = {
    "model_dim": 64,
    "num_layers": 2,
    "mlp_dim": 128,
    "segment": 64,
    "chunk": 32,
    "steps": 30,
    "warmup_steps": 10,
    "batch_size": 8,
    "seeds": 2,
    "validation_chars": 4096,
    "paper": {"steps": 20, "warmup_steps": 20, "table_rows": 256},
    "recall": {"steps": 20, "test_sequences": 64, "warmup_steps": 10},
}
"""The settings of --quick, which end within two minutes."""


def parse_settings(words: Iterable[str], start: dict[str, Any] | None = None) -> CompareConfig:
    """The settings from `key=value` words, over the values in `start`. A key of a section is written paper.steps=100, a
    list with commas. Raises ValueError for a malformed word, an unknown key (naming the nearest), one that comes twice,
    or a wrong value.
    """
    values: dict[str, Any] = copy.deepcopy(start or {})
    known = _keys()
    as_text = [key for key, kind in known.items() if kind in (str, list)]
    given: set[str] = set()
    for word in words:
        key, value = parse_word(word, "steps=200", as_text=as_text)
        check_new(key, given)
        given.add(key)
        if key not in known:
            raise ValueError(f"unknown key {key}{suggest(key, known)}")
        section, _, name = key.rpartition(".")
        target = values.setdefault(section, {}) if section else values
        target[name] = _value(key, value, known[key])
    return CompareConfig.from_dict(values)


def _keys() -> dict[str, type]:
    found: dict[str, type] = {}
    for name, hint in typing.get_type_hints(CompareConfig).items():
        if dataclasses.is_dataclass(hint):
            found.update({f"{name}.{key}": kind for key, kind in typing.get_type_hints(hint).items()})
        else:
            found[name] = hint
    return found


def _value(key: str, value: Any, kind: type) -> Any:
    if kind is list:
        words = [word.strip(" \"'") for word in value.strip("[]").split(",")]
        return [word for word in words if word]
    if kind is not str and isinstance(value, str | None):
        raise ValueError(f"{key}={value!r} must be {'an integer' if kind is int else 'a number'}")
    return value


def _at_least(config: Any, section: str, least: int, *names: str) -> None:
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{section}{name}={getattr(config, name)} must be at least {least}")


def _positive(config: Any, section: str, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{section}{name}={getattr(config, name)} must be positive")


def _names(key: str, given: list, known: Iterable[str]) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"unknown name {name!r} in {key}{suggest(str(name), known)}")
    if not given or len(set(given)) < len(given):
        raise ValueError(f"{key}={','.join(given)}: give at least one name, and each once")
