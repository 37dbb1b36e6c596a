"""The configuration of a training run: one dataclass for each section. `train/config_reader.py` reads it from files.

configs/base.yaml explains every key.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from attnzoo.apps import cache_directory
from attnzoo.files import user_path
from attnzoo.models import DecoderConfig

FREE_SECTIONS = ("task", "model", "data", "tokenizer")
"""Sections whose keys the task defines and checks (`train.tasks.base.Task.sections`), not OmegaConf."""


@dataclass
class OptimConfig:
    """name: adamw | muon. lr, muon_lr: peak learning rates. weight_decay: only of the weights of linear layers."""

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
    """kind: cosine | wsd | constant. decay_fraction: fraction of the steps, at the end, in which wsd decays.
    final_fraction: the last learning rate as a fraction of the peak."""

    kind: str = "cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    final_fraction: float = 0.1


@dataclass
class TrainConfig:
    """steps, max_minutes: length of the run; if both are set, the shorter one. batch_size: rows (sequences) of a step,
    on all ranks together. min_steps: with max_minutes, train at least so many steps, with a warning if they exceed the
    budget.

    non_finite: what to do after non_finite_steps steps in a row without an update, because the loss or a gradient was
    not finite: stop (exit status 1) | go_back (load the last checkpoint, and skip the data since then).
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
    """DeepSpeed ZeRO. stage: what is partitioned over the ranks (0: nothing, 1: optimizer state, 2: gradients too, 3:
    parameters too)."""

    stage: int = 1
    offload_optimizer: bool = False


@dataclass
class LoraConfig:
    """rank: of the adapters (null: no adapters, all weights train). targets: names of the linear layers that get an
    adapter in every block."""

    rank: int | None = None
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["query", "value"])


@dataclass
class EvalConfig:
    """every: steps between evaluations (null: only at the end). max_blocks: validation rows of each evaluation before
    the last one, which takes all. keep_best: the export is the mean of the weights of so many best evaluations (null:
    the last weights). below_ngrams: orders of byte n-gram models; scripts/demo.py checks that the run ends
    with fewer bits per byte.
    """

    every: int | None = 200
    batch_size: int = 16
    max_blocks: int | None = None
    keep_best: int | None = None
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
    """peak_flops: FLOP/s of one rank's device, for MFU on devices that attnzoo does not know."""

    every: int = 1
    progress: bool = True
    tensorboard: bool = True
    wandb: bool = False
    peak_flops: float | None = None


@dataclass
class CheckpointConfig:
    """resume: auto | never | a checkpoint directory. fallback: if that checkpoint is damaged or missing, take the
    newest undamaged one instead of an error. init_from: take the initial weights from an export, a directory of
    transformers, a .gguf file or a packaged model. adopt_model: take its model configuration and tokenizer too; of
    `model` and `tokenizer` only `model.attention_impl` then counts."""

    every: int | None = 500
    keep: int = 2
    resume: str = "auto"
    fallback: bool = False
    init_from: str | None = None
    adopt_model: bool = False


@dataclass
class WatchdogConfig:
    """Seconds that a phase may take; after them all ranks print their stacks and exit with status 1 (null: no limit).

    start: joining the ranks, and compiling an extension at the first start. data: preparing tokenizer and tokens. load:
    building the model and reading a checkpoint. step, evaluate, save: each time. stop: from a signal to the end of the
    phase, and of each step after it.
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
    """A run's configuration. `task`: what is trained. `model`, `data`, `tokenizer`: keys that the task defines, for
    language models those of DecoderConfig, DataConfig and TokenizerConfig."""

    name: str = "attnzoo"
    seed: int = 0
    run_dir: str | None = None
    cache_dir: str | None = None
    precision: str = "fp32"
    task: dict[str, Any] = field(default_factory=dict)
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
        """The run directory: run_dir, or runs/<name> in the current directory."""
        return user_path(self.run_dir or Path("runs") / self.name, "run_dir")

    @property
    def cache_path(self) -> Path:
        """The directory of prepared data, tokenizers and compiled extensions: cache_dir, or the default."""
        return user_path(self.cache_dir, "cache_dir") if self.cache_dir else cache_directory()

    @property
    def sequence_length(self) -> int:
        """Tokens of one training sequence."""
        return int(self.data.get("sequence_length", 256))

    def model_config(self, vocab_size: int) -> DecoderConfig:
        """The model's configuration, with the size of the tokenizer's vocabulary."""
        return DecoderConfig.from_dict({**self.model, "vocab_size": vocab_size})

    def to_yaml(self) -> str:
        """The configuration as YAML with every key, which `load_config` can read."""
        return OmegaConf.to_yaml(OmegaConf.structured(self))
