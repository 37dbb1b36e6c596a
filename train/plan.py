"""`--dry-run`: describes a run's sizes and memory without starting it."""

import torch

from attnzoo.models import DecoderConfig, DecoderLM, build_shapes
from attnzoo.planner.fits import Setup, training_memory
from attnzoo.report import counted, format_table
from train.config import Config
from train.deepspeed_config import deepspeed_config

MIB = 2**20


def describe(config: Config, model_config: DecoderConfig, world: int) -> str:
    """The resolved configuration, the model's sizes, and the memory of a rank at every ZeRO stage, as text."""
    accumulation = deepspeed_config(config, world)["gradient_accumulation_steps"]
    model = build_shapes(model_config)
    tokens = config.train.batch_size * config.sequence_length
    total, inner = model.num_parameters(), model.num_parameters(embeddings=False)
    rows = [memory_row(config, model, stage, world) for stage in range(4)]
    return "\n".join(
        [
            config.to_yaml().rstrip(),
            "",
            f"parameters: {total:,} in all, {inner:,} without embeddings",
            f"tokens per step: {tokens:,} = {counted(config.train.batch_size, 'sequence')} of "
            f"{config.sequence_length}, "
            f"{counted(world, 'rank')} x {counted(accumulation, 'pass', 'passes')} of {config.train.micro_batch_size}",
            f"MiB a rank, by a model (chosen: zero.stage={config.zero.stage}):"
            + (" all weights trained, with lora.rank it is less" if config.lora.rank is not None else ""),
            format_table(rows),
        ]
    )


def memory_row(config: Config, model: DecoderLM, stage: int, world: int) -> dict[str, int | float]:
    """Memory of a rank by part, in MiB."""
    setup = Setup(
        stage=stage,
        ranks=world,
        micro_batch=config.train.micro_batch_size,
        tokens=config.sequence_length,
        # Under autocast, weights, gradients and most activations are float32.
        precision="bf16" if config.precision == "bf16" else "fp32",
        optimizer="muon" if config.optim.name == "muon" else "adamw",
        checkpointing=config.train.activation_checkpointing,
        accumulate=config.train.batch_size > config.train.micro_batch_size * world,
        gpu=torch.cuda.is_available(),
    )
    memory = training_memory(model, setup)
    parts = {name: round(size / MIB, 1) for name, size in vars(memory).items()}
    return {"stage": stage, **parts, "sum": round(memory.total / MIB, 1)}
