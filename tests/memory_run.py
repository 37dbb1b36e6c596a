"""One rank of a training whose memory is measured: engine, model and two steps of two passes, all of it recorded.

    python tests/memory_run.py 0:fp32 1:bf16    (ZeRO stage and precision; or under the deepspeed launcher)

Prints a line of JSON a case: the most bytes held at once, and the plan's.
"""

import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from attnzoo.evaluate.fits import Setup, training_memory
from attnzoo.evaluate.memory import peak_bytes
from attnzoo.models import DecoderLM
from train.config import Config, load_config
from train.engine import Engine, finish, start

VOCABULARY, MICRO_BATCH, TOKENS, PASSES = 512, 2, 128, 2
RUNS = 3
"""The profiler does not see what a thread of the collectives releases, now and then the flat copy of all gradients; so
a run can look too large, never too small, and the smallest counts."""


def measured(training: Callable[[], Engine]) -> int:
    """The most bytes held at once."""
    peak = peak_bytes(training)
    gc.collect()  # an engine is full of cycles, and released later its memory would count for the next one
    return peak


def main() -> None:
    cases = [word.split(":") for word in sys.argv[1:] if not word.startswith("--")]
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    block = torch.randint(0, VOCABULARY, (MICRO_BATCH, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    device = None
    for stage, precision in cases:
        config = load_config("rcmha.yaml", settings(stage, precision, ranks))
        device = device or start(config, int(os.environ.get("LOCAL_RANK", "0")))

        def training(config: Config = config, device: torch.device = device) -> Engine:
            engine = Engine(config, DecoderLM(config.model_config(VOCABULARY)), device)
            for _ in range(2):
                for _ in range(PASSES):
                    engine.forward_backward(block[:, :-1], block[:, 1:])
                engine.step(1.0)
            return engine

        peak = min(measured(training) for _ in range(RUNS))
        with torch.device("meta"):
            model = DecoderLM(config.model_config(VOCABULARY))
        setup = Setup(
            stage=int(stage), ranks=ranks, micro_batch=MICRO_BATCH, tokens=TOKENS, precision=precision, gpu=False
        )
        memory = training_memory(model, setup)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps({"case": f"{stage}:{precision}", "measured": peak, "planned": memory.total}), flush=True)
    finish()


def settings(stage: str, precision: str, ranks: int) -> list[str]:
    """Overrides of configs/rcmha.yaml."""
    return [
        f"zero.stage={stage}",
        f"precision={precision}",
        "optim.name=adamw",
        f"train.batch_size={MICRO_BATCH * PASSES * ranks}",
        f"train.micro_batch_size={MICRO_BATCH}",
        "train.threads=1",
        "model.num_layers=3",
    ]


if __name__ == "__main__":
    main()
