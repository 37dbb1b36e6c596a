"""Builds DeepSpeed's configuration from a run's."""

from typing import Any

import torch

from train.config import Config
from train.config_layers import ConfigError


def deepspeed_config(config: Config, world: int) -> dict[str, Any]:
    """DeepSpeed's configuration for `world` ranks. Raises ConfigError if they cannot divide the batch size."""
    train = config.train
    per_pass = train.micro_batch_size * world
    if train.batch_size % per_pass:
        raise ConfigError(
            f"train.batch_size={train.batch_size} is not a multiple of train.micro_batch_size * ranks = "
            f"{train.micro_batch_size} * {world} = {per_pass}; change one of them"
        )
    zero: dict[str, Any] = {"stage": config.zero.stage}
    if config.zero.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.batch_size // per_pass,
        # Without ZeRO, DeepSpeed does not report the norm of float32 gradients; `TrainingEngine.step` clips them.
        "gradient_clipping": 0.0 if clips_itself(config) else train.gradient_clipping,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # Use torch's optimizer: DeepSpeed's CPU Adam would need a compiler on every machine.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.precision == "bf16"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def clips_itself(config: Config) -> bool:
    """Whether `TrainingEngine.step` clips gradients instead of DeepSpeed."""
    return config.zero.stage == 0 and config.precision != "bf16"
