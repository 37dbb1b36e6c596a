"""`--dry-run`: what a run would take, without starting it."""

import torch

from attnzoo.models import DecoderLM
from attnzoo.report import format_table
from train.config import Config
from train.engine import DTYPES, deepspeed_config
from train.optim import optimizer_bytes, param_groups

MIB = 2**20


def describe(config: Config, vocab_size: int, world: int) -> str:
    """The resolved configuration, sizes, and an estimate of memory a rank for every ZeRO stage."""
    accumulation = deepspeed_config(config, world)["gradient_accumulation_steps"]
    with torch.device("meta"):
        model = DecoderLM(config.model_config(vocab_size))
    tokens = config.train.batch_size * config.sequence_length
    total, inner = model.num_parameters(), model.num_parameters(embeddings=False)
    rows = [memory_row(config, model, stage, world) for stage in range(4)]
    return "\n".join(
        [
            config.to_yaml().rstrip(),
            "",
            f"parameters: {total:,} in all, {inner:,} without embeddings",
            f"tokens per step: {tokens:,} = {config.train.batch_size} sequences of {config.sequence_length}, "
            f"{world} ranks x {accumulation} passes of {config.train.micro_batch_size}",
            f"MiB a rank, estimated (chosen: zero.stage={config.zero.stage}):",
            format_table(rows),
        ]
    )


def memory_row(config: Config, model: DecoderLM, stage: int, world: int) -> dict[str, int | float]:
    """Estimated MiB of a rank. Activations are rough: what the blocks and the loss keep for the backward pass."""
    count, width = model.num_parameters(), torch.empty((), dtype=DTYPES[config.precision]).element_size()
    state = optimizer_bytes(model, param_groups(model, config.optim))
    # ZeRO 1 to 3 keep a float32 copy of the part they update, also of float32 weights (stage 3: not of those).
    master = 4 * count if (stage in (1, 2) or width == 2) else 0
    parts = {
        "parameters": width * count / (world if stage == 3 else 1),
        "gradients": width * count / (world if stage >= 2 else 1),
        "optimizer": (state + master) / (world if stage >= 1 else 1),
        "activations": activation_bytes(config, model, width),
    }
    rounded = {name: round(size / MIB, 1) for name, size in parts.items()}
    return {"stage": stage, **rounded, "sum": round(sum(parts.values()) / MIB, 1)}


def activation_bytes(config: Config, model: DecoderLM, width: int) -> int:
    """About 8 tensors of model width and 3 of the MLP's a layer (one with checkpointing), and logits three times."""
    tokens = config.train.micro_batch_size * config.sequence_length
    c = model.config
    layer = 8 * c.model_dim + 3 * c.hidden_width()
    kept = c.num_layers * c.model_dim + layer if config.train.activation_checkpointing else c.num_layers * layer
    return tokens * (width * kept + 3 * 4 * c.vocab_size)
