"""Sizes of the benchmark: what is measured, and the small ones of --quick."""

from dataclasses import dataclass, field

from attnzoo.tasks.symbols import SYMBOL_TASKS
from scripts.caches.speed import SpeedSizes


@dataclass(frozen=True, kw_only=True)
class QualitySizes:
    """context: tokens that questions are about. count: examples of a task and seed. batch: of them side by side.
    chunk: tokens of a prompt that are read at once. window: of observation, for policies that have one. token_budgets,
    channel_budgets: shares of the full cache's bytes, for policies that drop tokens and for those that drop channels of
    keys. least: accuracy of the full cache that makes a task worth asking. drawn: examples of a task and seed of which
    the first `count` that the full cache answers under all conditions are asked, for models that are not sure of any
    task; None: all are asked."""

    tasks: tuple[str, ...]
    context: int
    count: int
    batch: int
    chunk: int
    window: int
    least: float
    token_budgets: tuple[float, ...]
    channel_budgets: tuple[float, ...]
    drawn: int | None = None


@dataclass(frozen=True, kw_only=True)
class FidelitySizes:
    """texts: windows of prose; prompt: tokens before compression; forced: tokens after it, at least 128 of them."""

    texts: int = 8
    prompt: int = 512
    forced: int = 128


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All sizes; `seeds` of the examples."""

    seeds: int = 3
    symbols: QualitySizes = field(
        default_factory=lambda: QualitySizes(
            tasks=tuple(SYMBOL_TASKS),
            context=192,
            count=16,
            batch=16,
            chunk=64,
            window=8,
            least=0.95,
            token_budgets=(0.5, 0.3, 0.2),
            channel_budgets=(0.95, 0.85),
        )
    )
    # SmolLM2-135M solves neither variables nor words in English (0 of 6 each, docs/lab-notes.md).
    text: QualitySizes = field(
        default_factory=lambda: QualitySizes(
            tasks=("passkey", "needles", "recall"),
            context=384,
            count=4,
            batch=8,
            chunk=128,
            window=32,
            least=1.0,
            token_budgets=(0.5, 0.2),
            channel_budgets=(0.85,),
            drawn=32,
        )
    )
    fidelity: FidelitySizes = field(default_factory=FidelitySizes)
    speed: SpeedSizes = field(default_factory=SpeedSizes)


QUICK = Settings(
    seeds=1,
    symbols=QualitySizes(
        tasks=("passkey", "words"),
        context=96,
        count=2,
        batch=2,
        chunk=32,
        window=8,
        least=0.0,
        token_budgets=(0.6,),
        channel_budgets=(0.85,),
    ),
    text=QualitySizes(
        tasks=("passkey",),
        context=256,
        count=2,
        batch=2,
        chunk=128,
        window=32,
        least=0.0,
        token_budgets=(0.6,),
        channel_budgets=(0.85,),
    ),
    fidelity=FidelitySizes(texts=1, prompt=96, forced=128),
    speed=SpeedSizes(context=256, batches=(2, 3), steps=2, turns=1, chunk=128, compiled=False),
)
