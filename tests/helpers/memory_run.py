"""One rank of a training whose memory is measured: engine, model and two steps of two passes, all of it recorded.

    python tests/helpers/memory_run.py 0:fp32 1:bf16    (ZeRO stage and precision; or under the deepspeed launcher)

Prints a line of JSON a case: the most bytes held at once, and the plan's.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from attnzoo.models import DecoderLM
from attnzoo.planner.fits import Setup, training_memory
from attnzoo.profiling.memory import peak_bytes
from train.config import Config
from train.config_reader import load_config
from train.engine import TrainingEngine, start
from train.ranks import finish
from train.tasks import LanguageTask

VOCABULARY, MICRO_BATCH, TOKENS, PASSES = 512, 2, 128, 2
RUNS = 2
"""A run can look too large, never too small, so the smallest counts."""
COLLECTIVES = ("all_reduce", "reduce", "broadcast", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather")
HELD = 0.01
"""Seconds that a collective is held when it is done: a thousand times what its thread takes to let go of it."""


def release_here() -> None:
    """Makes sure that this thread is the last one to hold what a collective was given, and the copies it made.

    The profiler does not see what another thread releases. The one that runs gloo's collectives drops its references a
    little after it has said that it is done; where the caller's are gone by then, a flat copy of all gradients looks as
    if it were held for ever. So the collective's handle, which holds all of it, is kept for longer than that.
    """
    for name in COLLECTIVES:
        setattr(dist, name, _held(getattr(dist, name)))


def _held(collective: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, async_op: bool = False, **options: Any) -> Any:
        handle = collective(*arguments, async_op=True, **options)
        if handle is not None:
            handle.wait()
        time.sleep(HELD)
        return handle if async_op else None

    return run


def measured(training: Callable[[], TrainingEngine]) -> int:
    """The most bytes held at once."""
    peak = peak_bytes(training)
    gc.collect()  # an engine is full of cycles, and released later its memory would count for the next one
    return peak


def main() -> None:
    cases = [word.split(":") for word in sys.argv[1:] if not word.startswith("--")]
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    block = torch.randint(0, VOCABULARY, (MICRO_BATCH, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    device = None
    release_here()
    for stage, precision in cases:
        config = load_config("rcmha.yaml", settings(stage, precision, ranks))
        device = device or start(config, int(os.environ.get("LOCAL_RANK", "0")))

        def training(config: Config = config, device: torch.device = device) -> TrainingEngine:
            engine = TrainingEngine(LanguageTask(config), DecoderLM(config.model_config(VOCABULARY)), device)
            for _ in range(2):
                for _ in range(PASSES):
                    targets = float(block[:, 1:].numel() * PASSES * ranks)
                    engine.forward_backward((block[:, :-1], block[:, 1:]), targets)
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
