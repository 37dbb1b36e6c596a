"""What a training run is configured by: a dataclass for each section. `train/config_reader.py` reads it from files.

configs/base.yaml holds every key with a comment.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from attnzoo.apps import cache_directory
from attnzoo.files import user_path
from attnzoo.models import DecoderConfig

FREE_SECTIONS = ("model", "data", "tokenizer")
"""Sections whose keys belong to others (DecoderConfig, train.data): checked by their owners, not by OmegaConf."""


@dataclass
class OptimConfig:
    """name: adamw | muon. Rates are peaks; `schedule` scales them. Weight decay touches linear maps only."""

    name: str = "adamw"
    lr: float = 3e-3
    muon_lr: float = 2e-2
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    newton_schulz_steps: int = 5


@dataclass
class ScheduleConfig:
    """kind: cosine | wsd | constant. decay_fraction: the last part of all steps in which wsd falls."""

    kind: str = "cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    final_fraction: float = 0.1


@dataclass
class TrainConfig:
    """steps or max_minutes (or both: the smaller); batch_size counts sequences a step over all ranks.

    min_steps: with max_minutes, so many steps are taken even where the budget ends before; the run says so.

    non_finite_steps: so many steps in a row without an update, because the loss or a gradient was not finite, and the
    run does what non_finite says: stop (exit status 1) | go_back (to the last checkpoint, past the data in between).
    """

    steps: int | None = None
    max_minutes: float | None = None
    min_steps: int | None = None
    stop_at_step: int | None = None
    batch_size: int = 32
    micro_batch_size: int = 16
    gradient_clipping: float = 1.0
    non_finite: str = "stop"
    non_finite_steps: int = 5
    activation_checkpointing: bool = False
    compile: bool = False
    threads: int | None = None


@dataclass
class ZeroConfig:
    """DeepSpeed ZeRO: what is cut over the ranks (0 nothing, 1 optimiser, 2 + gradients, 3 + parameters)."""

    stage: int = 1
    offload_optimizer: bool = False


@dataclass
class LoraConfig:
    """rank: of the adapters (null: none, all weights train). targets: the linear maps that get one, in every layer."""

    rank: int | None = None
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["query", "value"])


@dataclass
class EvalConfig:
    """every: steps between evaluations (null: only the last). max_blocks: of those on the way.

    below_ngrams: orders of byte n-gram models; scripts/demo.py claims that the run ends below their bits per byte.
    """

    every: int | None = 200
    batch_size: int = 16
    max_blocks: int | None = None
    below_ngrams: list[int] = field(default_factory=list)


@dataclass
class SampleConfig:
    """every: steps between text samples (null: none)."""

    every: int | None = None
    prompts: list[str] = field(default_factory=lambda: ["def "])
    max_new_tokens: int = 64
    temperature: float = 0.8
    top_p: float = 0.95


@dataclass
class LogConfig:
    """peak_flops: of one rank's device, for MFU where the device is not known."""

    every: int = 1
    progress: bool = True
    tensorboard: bool = True
    wandb: bool = False
    peak_flops: float | None = None


@dataclass
class CheckpointConfig:
    """resume: auto | never | a checkpoint directory. fallback: where that one is damaged or not named, take the newest
    whole one instead of refusing. init_from: a model to take weights from: an export, a directory of
    transformers, a .gguf file or the name of a packaged model. adopt_model: take its model and tokenizer too; `model`
    and `tokenizer` then say nothing but `model.attention_impl`."""

    every: int | None = 500
    keep: int = 2
    resume: str = "auto"
    fallback: bool = False
    init_from: str | None = None
    adopt_model: bool = False


@dataclass
class WatchdogConfig:
    """Seconds that a phase may take before all ranks print their stacks and end with status 1 (null: no limit).

    start: joining the ranks and the first compilation. data: preparing tokenizer and tokens. load: building the model
    and reading a checkpoint. step, evaluate, save (and export): each time. stop: the rest of a phase after a signal.
    """

    start: float | None = 900.0
    data: float | None = 7200.0
    load: float | None = 1800.0
    step: float | None = 900.0
    evaluate: float | None = 3600.0
    save: float | None = 1800.0
    stop: float | None = 120.0


@dataclass
class Config:
    """All of a run. `model`, `data` and `tokenizer` hold the keys of DecoderConfig, DataConfig and the tokenizer."""

    name: str = "attnzoo"
    seed: int = 0
    run_dir: str | None = None
    cache_dir: str | None = None
    precision: str = "fp32"
    model: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)

    @property
    def run_path(self) -> Path:
        """Where the run writes: run_dir, or runs/<name> below the current directory."""
        return user_path(self.run_dir or Path("runs") / self.name, "run_dir")

    @property
    def cache_path(self) -> Path:
        """Where prepared data, tokenizers and compiled extensions are kept: cache_dir, or `attnzoo.apps` says."""
        return user_path(self.cache_dir, "cache_dir") if self.cache_dir else cache_directory()

    @property
    def sequence_length(self) -> int:
        """Tokens of one training sequence."""
        return int(self.data.get("sequence_length", 256))

    def model_config(self, vocab_size: int) -> DecoderConfig:
        """The model's configuration, with the tokenizer's vocabulary."""
        return DecoderConfig.from_dict({**self.model, "vocab_size": vocab_size})

    def to_yaml(self) -> str:
        """Every key with its value; `load_config` reads it back."""
        return OmegaConf.to_yaml(OmegaConf.structured(self))
