"""The sizes of the benchmark, and the small ones of --quick."""

from dataclasses import dataclass, field

from attnzoo.tasks.symbols import SYMBOL_TASKS
from scripts.caches.speed import SpeedSizes


@dataclass(frozen=True, kw_only=True)
class QualitySizes:
    """context: tokens of a context. count: examples of a task and seed. batch: examples at a time. chunk: tokens of a
    prompt chunk. window: tokens of the observation window, for policies that have one. token_budgets, channel_budgets:
    fractions of the full cache's bytes, for policies that drop tokens and for those that drop channels of keys. least:
    accuracy of the full cache from which on a task is measured. drawn: examples to choose from, of which the first
    `count` that the full cache answers are measured, for models that solve no task reliably (None: all)."""

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
    """texts: number of texts; prompt: tokens before compression; forced: tokens after it, at least 128."""

    texts: int = 8
    prompt: int = 512
    forced: int = 128


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All sizes. seeds: number of seeds for examples."""

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
    fidelity=FidelitySizes(texts=1, prompt=96, forced=40),
    speed=SpeedSizes(context=256, batches=(2, 3), steps=2, turns=1, chunk=128, compiled=False),
)
