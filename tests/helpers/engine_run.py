"""Steps of the training loop under DeepSpeed, many settings in one launch: what each reports, and its weights.

    deepspeed --num_accelerators 2 tests/helpers/engine_run.py --cases cases.json --out directory

cases.json maps names to lists of overrides of configs/base.yaml; beside them `steps`, `untied`, `frozen` (the
beginning of the names of parameters that do not train), `samples` (text samples, twice after every step), `counts`
(as COUNTS) and `continued` (exports after the steps, then one more step by the same engine and by a new one that reads
its checkpoint).
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from safetensors.torch import save_file
from torch import Tensor

from attnzoo.checkpoint import save_model
from attnzoo.models import DecoderLM
from tests.helpers.training import last_of
from train import engine as engines
from train.checkpoint import TrainingProgress
from train.config import Config
from train.config_reader import load_config
from train.engine import TrainingEngine
from train.evaluate import samples, validate
from train.loop import TrainingRun, take_step
from train.lora import add_adapters
from train.ranks import finish, gather
from train.tasks import LanguageTask

VOCABULARY, LENGTH, BATCH = 37, 12, 8
BASE = [
    "model.model_dim=24",
    "model.num_layers=2",
    "model.attention={kind: mha, num_heads: 2}",
    "model.init_std=0.2",
    f"model.max_positions={LENGTH}",
    f"data.sequence_length={LENGTH}",
    "schedule.kind=constant",
    "schedule.warmup_steps=0",
    f"train.batch_size={BATCH}",
    "train.micro_batch_size=2",
    "train.gradient_clipping=1000",
    "train.steps=100",
]
COUNTS = (12, 1, 0, 0, 3, 12, 7, 0)
"""Targets that count in each row of a global batch, its first ones (below 0: its last ones); rows 2 and 3, one pass of
two, have none."""


def batch(step: int, counts: Sequence[int] = COUNTS) -> tuple[Tensor, Tensor]:
    """(tokens_BT, targets_BT) of a global batch."""
    generator = torch.Generator().manual_seed(step)
    block = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    tokens_BT, targets_BT = block[:, :-1].clone(), block[:, 1:].clone()
    for row, count in enumerate(counts):
        targets_BT[row, slice(count, None) if count >= 0 else slice(None, count)] = -100
    return tokens_BT, targets_BT


class Stream:
    """`batch` after `batch`, cut over the ranks."""

    def __init__(self, counts: Sequence[int]) -> None:
        self.step, self.counts = 0, counts

    def next(self, batch_size: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
        rows = slice(rank * batch_size, (rank + 1) * batch_size)
        tokens_BT, targets_BT = batch(self.step, self.counts)
        self.step += 1
        return tokens_BT[rows], targets_BT[rows]

    def state(self) -> dict[str, int]:
        return {"step": self.step}

    def load(self, state: Mapping[str, int]) -> None:
        self.step = state["step"]


class Data:
    """The stream, and one of its batches to validate on."""

    sequence_length, num_train_tokens, num_train_bytes = LENGTH, 1, 1

    def __init__(self, counts: Sequence[int]) -> None:
        self.train, self.counts = Stream(counts), counts

    def validation_blocks(self, most: int | None = None) -> tuple[Tensor, Tensor]:
        tokens_NT, targets_NT = batch(100, self.counts)
        return tokens_NT[:most], targets_NT[:most]

    def bytes_per_token(self, targets_NT: Tensor) -> float:
        return 1.0


class Letters:
    """A token a character."""

    eos_id = 0

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        return [1] * bos + [2 + ord(letter) % 30 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def build(overrides: list[str], untied: bool = False, frozen: str | None = None) -> tuple[Config, DecoderLM]:
    """Configuration and model of a case."""
    config = load_config("base.yaml", last_of([*BASE, f"model.tie_embeddings={str(not untied).lower()}", *overrides]))
    torch.manual_seed(0)
    model = DecoderLM(config.model_config(VOCABULARY))
    if config.lora.rank is not None:
        add_adapters(model, config.lora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # adapters begin as zeros, and would hide what their other half does
                torch.nn.init.normal_(parameter, std=0.1)
    for name, parameter in model.named_parameters():
        if frozen is not None and name.startswith(frozen):
            parameter.requires_grad_(False)
    return config, model


class Never:
    """No signal comes."""

    def requested(self) -> bool:
        return False


def begin(config: Config, model: DecoderLM, device: torch.device, counts: Sequence[int]) -> TrainingRun:
    """A run of which only steps are taken."""
    task = LanguageTask(config)
    task.data, task.tokenizer = Data(counts), Letters()  # type: ignore[assignment]
    task.train = task.data.train
    progress = TrainingProgress(total_steps=config.train.steps)
    return TrainingRun(TrainingEngine(task, model, device), None, progress, None, None)  # type: ignore[arg-type]


def run(case: dict[str, Any], device: torch.device, out: Path) -> dict[str, Any]:
    """Takes the steps of a case; its weights after each go to files."""
    config, model = build(case["overrides"], case.get("untied", False), case.get("frozen"))
    training = begin(config, model, device, case.get("counts", COUNTS))
    engine, progress = training.engine, training.progress
    found: dict[str, Any] = {"losses": [], "norms": [], "texts": []}

    sizes = (1, 3, 8) if "counts" in case else (3,)
    found["validation"] = [validate(engine, size, None)["loss"] for size in sizes]  # type: ignore[index]
    for _ in range(case.get("steps", 1)):
        step = take_step(training, Never())  # type: ignore[arg-type]
        found["losses"].append(step.loss)
        found["norms"].append(step.gradient_norm)
        if case.get("samples"):
            found["texts"].append(samples(engine, seed=progress.step))
            # Once more from another random state: whatever drew from it would differ.
            before = torch.get_rng_state()
            torch.manual_seed(99)
            found["texts"].append(samples(engine, seed=progress.step))
            torch.set_rng_state(before)
    found["random"] = torch.rand(3).tolist()
    whole = engine.full_state()
    if whole is not None:
        own = dict(engine.model.named_parameters())  # a tied head has one name here, and two in the state
        save_file({name: whole[name].contiguous() for name in own}, out)
    merged = engine.full_model()
    if merged is not None:
        found["exported"] = sorted(merged.state_dict())
    if case.get("continued"):
        found["seen"] = gather([buffer.item() for name, buffer in model.named_buffers() if name.endswith(".usual")])
        found["continued"] = continued(case, training, device, out.with_suffix(""))
    return found


def continued(case: dict[str, Any], training: TrainingRun, device: torch.device, out: Path) -> list[float]:
    """Losses of one more step, without and with a break; the exports before and after go to `out`-0, -1 and -2."""
    engine, position = training.engine, training.task.train.state()
    engine.save(out.parent, f"{out.name}-checkpoint")
    exported(engine, f"{out}-0")
    losses = [take_step(training, Never()).loss]  # type: ignore[arg-type]
    exported(engine, f"{out}-1")
    config, model = build(case["overrides"], case.get("untied", False), case.get("frozen"))
    for tensor in model.state_dict().values():
        tensor.zero_()  # what is not read would show
    again = begin(config, model, device, case.get("counts", COUNTS))
    engine = again.engine
    engine.load(Path(f"{out}-checkpoint"))
    again.task.train.load(position)
    losses.append(take_step(again, Never()).loss)  # type: ignore[arg-type]
    exported(engine, f"{out}-2")
    return losses


def exported(engine: TrainingEngine, directory: str) -> None:
    """What a run's export is (all ranks call it)."""
    model = engine.full_model()
    if model is not None:
        save_model(Path(directory), model)


def main() -> int:
    """Runs all cases; rank 0 writes results.json and a file of weights a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--local_rank", type=int, default=int(os.environ.get("LOCAL_RANK", "0")))
    options = parser.parse_args()
    cases = json.loads(options.cases.read_text(encoding="utf-8"))
    device = engines.start(load_config("base.yaml", [*BASE, "train.threads=1"]), options.local_rank)
    results = {name: run(case, device, options.out / f"{name}.safetensors") for name, case in cases.items()}
    if os.environ["RANK"] == "0":
        (options.out / "results.json").write_text(json.dumps(results), encoding="utf-8")
    finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
