"""The runs of a comparison: their models, matched widths, and settings."""

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from attnzoo.attention import ATTENTION
from attnzoo.checkpoint.sources import sources_of
from attnzoo.models import DecoderConfig, DecoderLM
from scripts.compare.config import CompareConfig
from scripts.compare.matching import Match, match
from scripts.compare.segments import Form, has_query_history
from scripts.compare.text import Text, load_text


@dataclass(frozen=True)
class Run:
    """One run. table: of `TABLES`. form: of the segments, only in the paper's setting."""

    table: str
    variant: str
    seed: int
    form: Form | None = None


class Comparison:
    """The text, widths and runs of a configuration, each computed once."""

    def __init__(self, config: CompareConfig) -> None:
        self.config = config
        self._matches: dict[str, dict[str, Match]] = {}

    @cached_property
    def text(self) -> Text:
        """The text. Raises ValueError if it cannot be read."""
        return load_text(self.config.text, self.config.validation_chars)

    @cached_property
    def text_hash(self) -> str:
        """A digest that identifies the text."""
        ids = torch.cat([self.text.train, self.text.validation])
        return hashlib.sha256(self.text.characters.encode() + ids.numpy().tobytes()).hexdigest()

    def decoder(self, variant: str, mlp_dim: int, positions: int) -> DecoderConfig:
        """The model with the paper's block and a variant, and position tables of `positions` rows."""
        config = self.config
        return _decoder(config, self.text.vocab_size, mlp_dim, positions, attention_spec(variant, config.num_heads))

    def recall_decoder(self, variant: str, mlp_dim: int) -> DecoderConfig:
        """The small model for the recall task, with the same kind of block."""
        recall = self.config.recall
        spec = attention_spec(variant, recall.num_heads)
        return _decoder(recall, recall.vocab_size, mlp_dim, recall.length, spec)

    def matches(self, table: str) -> dict[str, Match]:
        """Every variant's matched width, in the tables "parameters", "flops" and "recall" (equal parameters)."""
        if table not in self._matches:
            config, recall = self.config, table == "recall"
            builders: dict[str, Callable[[int], DecoderConfig]] = {
                variant: partial(self._candidate, table, variant) for variant in config.variants
            }
            base, length = (config.recall.mlp_dim, config.recall.length) if recall else (config.mlp_dim, config.segment)
            self._matches[table] = match(builders, "flops" if table == "flops" else "parameters", base, length)
        return self._matches[table]

    def _candidate(self, table: str, variant: str, width: int) -> DecoderConfig:
        if table == "recall":
            return self.recall_decoder(variant, width)
        return self.decoder(variant, width, self.config.segment)

    def width(self, run: Run) -> int:
        """The hidden width of a run's MLP: matched, or, in the paper's setting, that of the paper."""
        return self.config.mlp_dim if run.table == "paper" else self.matches(run.table)[run.variant].mlp_dim

    def name(self, run: Run) -> str:
        """The name of a run's file. The tables "parameters" and "flops" share runs of equal width."""
        if run.table in ("parameters", "flops"):
            return f"text-{run.variant}-width{self.width(run)}-seed{run.seed}"
        return "-".join(filter(None, (run.table, run.variant, run.form, f"seed{run.seed}")))

    def steps(self, run: Run) -> int:
        """Number of training steps of a run."""
        config = self.config
        return {"paper": config.paper.steps, "recall": config.recall.steps}.get(run.table, config.steps)

    def forms(self, variant: str) -> list[Form]:
        """The forms of the paper's setting for a variant. None for a state of constant size, because the paper's memory
        of hidden states is a cache, which such a variant does not need."""
        attention = DecoderLM(self.decoder(variant, 1, 2)).layers()[0].attention
        if attention.traits.growth == "O(1)":
            return []
        return ["published", "carried"] if has_query_history(attention) else ["published"]

    def plan(self) -> list[Run]:
        """All runs by table; seeds vary slowest, so that an interrupted comparison has complete seeds."""
        config = self.config
        runs: list[Run] = []
        for table in config.tables:
            if table == "paper":
                kinds = [(variant, form) for variant in config.variants for form in self.forms(variant)]
                seeds = range(config.paper.seeds)
                runs += [Run(table, variant, seed, form) for seed in seeds for variant, form in kinds]
            else:
                runs += [Run(table, variant, seed) for seed in range(config.seeds) for variant in config.variants]
        return runs

    def settings(self, run: Run) -> dict[str, Any]:
        """The settings on which a run's results depend."""
        values = self.config.to_dict()
        content: dict[str, Any] = {"width": self.width(run), "gradient_clip": self.config.gradient_clip}
        content |= {f"{each['file']} (content)": each["digest"] for each in sources_of([run.variant]).values()}
        if run.table == "recall":
            return content | values["recall"]
        content |= {"text": self.text_hash}
        keys = ["model_dim", "num_heads", "num_layers"]
        if run.table == "paper":
            section = {key: value for key, value in values["paper"].items() if key not in ("seeds", "table_rows")}
        else:
            section = {}
            keys += ["segment", "batch_size", "steps", "lr", "warmup_steps", "chunk", "extrapolation_chars"]
        return content | {key: values[key] for key in keys} | section


def attention_spec(variant: str, num_heads: int) -> dict[str, Any]:
    """The variant with `num_heads` (if it has heads) and default options."""
    has_heads = "num_heads" in {field.name for field in dataclasses.fields(ATTENTION.get(variant).Config)}
    return {"kind": variant, "num_heads": num_heads} if has_heads else {"kind": variant}


def _decoder(sizes: Any, vocab_size: int, mlp_dim: int, positions: int, attention: dict[str, Any]) -> DecoderConfig:
    """The model of the paper's code: pre-LayerNorm, ReLU, untied output, no dropout (arXiv 2308.03429)."""
    return DecoderConfig(
        vocab_size=vocab_size,
        model_dim=sizes.model_dim,
        num_layers=sizes.num_layers,
        attention=attention,
        max_positions=positions,
        norm="layernorm",
        mlp="relu",
        mlp_dim=mlp_dim,
        tie_embeddings=False,
    )
