"""`attnzoo plan`: which training setups fit on a number of GPUs, the shortest step time, and how many sequences fit.

    attnzoo plan --model rcmha.yaml --gpus 64 --gpu-memory 80 --context 131072

Memory is derived from the model's own code (`attnzoo.derived_memory`) for the implementation "torch", and tests compare
it with real runs; GPU kernels need less workspace and save less of a norm. Times are rooflines from data sheets: peak
compute and bandwidth, without overlap of communication.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from attnzoo.models import DecoderLM, build_shapes
from attnzoo.planner.chips import Chip, chosen_chips
from attnzoo.planner.fits import (
    GIB,
    Setup,
    TrainingMemory,
    activation_memory,
    communicated_bytes,
    training_memory,
)
from attnzoo.planner.model_file import ModelFile, read_model
from attnzoo.planner.serving import cache_bytes, serving_report
from attnzoo.report import counted, format_table
from attnzoo.types import LARGEST

RESERVE = 0.05
"""Fraction of a GPU's memory left free for the driver's context, kernels and fragmentation of the allocator."""
MOST_MEMORY = 1 << 20
"""Upper bound of --gpu-memory in GiB."""
MOST = 4096
"""Largest micro-batch that the search considers, in sequences."""


@dataclass(frozen=True)
class Option:
    """A training setup that fits. communication: bytes that one rank sends in a step."""

    setup: Setup
    memory: TrainingMemory
    communication: int


@dataclass(frozen=True)
class PlanOptions:
    """The checked command line. memory: usable bytes of one GPU. context: tokens of a sequence."""

    model: DecoderLM
    gpus: int
    nodes: int
    memory: int
    context: int
    precision: Any
    optimizer: Any
    batch_tokens: int | None


def run(options: argparse.Namespace) -> int:
    """Prints the plan; exit status 1 if no training setup fits. Raises ValueError for wrong usage."""
    file = read_model(options.model, options.vocab_size)
    request = checked(options, file)
    states = cache_bytes(request.model, request.context, options.cache)
    chips = chosen_chips(options.chip)
    print(heading(file, request))
    found = [best for setup in setups(request) if (best := largest(request, setup)) is not None]
    if found:
        chosen = choose(found)
        print(
            f"\nTraining, GiB of one GPU at the largest micro-batch that fits\n{training_table(request, found, chosen)}"
        )
        print(why(chosen))
        print(f"\nLeast time of a step (a model, not a measurement)\n{step_table(request, chosen, chips)}")
    else:
        print(f"\n{nothing_fits(request)}", file=sys.stderr)
    print(f"\n{serving_report(request.model, states, request.context, request.memory, request.precision, chips)}")
    print(f"\nChips\n{chip_table(chips)}")
    return 0 if found else 1


def checked(options: argparse.Namespace, file: ModelFile) -> PlanOptions:
    """The checked options, and the model without storage. Raises ValueError that names the option and its value."""
    context = file.config.max_positions if options.context is None else options.context
    nodes = -(-options.gpus // 8) if options.nodes is None else options.nodes
    for name, value in (("--context", context), ("--gpus", options.gpus), ("--nodes", nodes)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
        if value > LARGEST:
            raise ValueError(f"{name}={value} must be at most {LARGEST}")
    if not 0 < options.gpu_memory < MOST_MEMORY:
        raise ValueError(
            f"--gpu-memory={options.gpu_memory} must be positive, below {MOST_MEMORY}: GiB of one GPU, for example 80"
        )
    if nodes > options.gpus:
        raise ValueError(f"--nodes={nodes} is more than --gpus={options.gpus}; a machine needs at least one GPU")
    if options.nodes is not None and options.gpus % nodes:
        raise ValueError(f"--nodes={nodes} does not divide --gpus={options.gpus}; every machine has as many GPUs")
    if options.batch_tokens is not None and options.batch_tokens < options.gpus * context:
        raise ValueError(
            f"--batch-tokens={options.batch_tokens} is less than one sequence a GPU: --gpus={options.gpus} times "
            f"--context={context} is {options.gpus * context}; give more tokens, fewer GPUs or a shorter context"
        )
    model = build_shapes(file.config)
    return PlanOptions(
        model=model.bfloat16() if options.precision == "bf16" else model,
        gpus=options.gpus,
        nodes=nodes,
        memory=int(options.gpu_memory * GIB * (1 - RESERVE)),
        context=context,
        precision=options.precision,
        optimizer=options.optimizer,
        batch_tokens=options.batch_tokens,
    )


def heading(file: ModelFile, request: PlanOptions) -> str:
    """The first lines of the plan: model, GPUs, context."""
    model, config = request.model, file.config
    attention = config.attention if isinstance(config.attention, list) else [config.attention]
    kinds = ", ".join(dict.fromkeys(spec if isinstance(spec, str) else spec["kind"] for spec in attention))
    lines = [
        f"{kinds}: {model.num_parameters():,} parameters, {model.num_parameters(embeddings=False):,} without "
        f"embeddings; {config.num_layers} layers of {config.model_dim}, vocabulary {config.vocab_size:,} "
        f"({file.vocabulary_source})",
        f"{counted(request.gpus, 'GPU')} in {counted(request.nodes, 'machine')}, {request.memory / GIB:.1f} GiB of "
        f"each ({RESERVE:.0%} left free); context {request.context:,}, {request.precision}, {request.optimizer}",
    ]
    if request.context > config.max_positions:
        lines.append(
            f"note: the context is longer than model.max_positions={config.max_positions}; a position table has so "
            "many rows, and longer distances share the last one"
        )
    return "\n".join(lines)


def setups(request: PlanOptions) -> list[Setup]:
    """The training setups to try: every ZeRO stage, with and without activation checkpointing."""
    return [
        Setup(
            stage=stage,
            ranks=request.gpus,
            tokens=request.context,
            precision=request.precision,
            optimizer=request.optimizer,
            checkpointing=checkpointing,
        )
        for stage in range(4)
        for checkpointing in (False, True)
    ]


def largest(request: PlanOptions, setup: Setup) -> Option | None:
    """The setup with the largest micro-batch that fits; None if one sequence does not fit."""
    most = MOST
    if request.batch_tokens is not None:
        most = min(most, request.batch_tokens // (request.gpus * request.context))

    def total(micro_batch: int) -> int:
        return training_memory(request.model, replace(setup, micro_batch=micro_batch)).total

    found = largest_within(request.memory, total, most)
    if found == 0:
        return None
    best = replace(setup, micro_batch=found)
    communication = communicated_bytes(request.model, best, passes(request, best))
    return Option(best, training_memory(request.model, best), communication)


def largest_within(limit: int, total: Callable[[int], int], most: int, near: float = 0.0) -> int:
    """The largest number up to `most` whose total is at most `limit`, 0 if there is none. Totals grow, nearly in a
    straight line, and take time: a guess is where the line through the last two meets the limit; every fourth halves
    what is left. `near`: by what share the answer may be too small."""
    low, high, guess = 0, most + 1, 1
    before: tuple[int, int] | None = None
    for step in itertools.count():
        if high - low <= 1 + near * low:
            return low
        guess = min(max(guess, low + 1), high - 1)
        here = total(guess)
        low, high = (guess, high) if here <= limit else (low, guess)
        slope = 0.0 if before is None else (here - before[1]) / (guess - before[0])
        before = guess, here
        if step == 0:
            guess = 2
        elif step % 4 == 3 or slope <= 0:
            guess = (low + high) // 2
        else:
            guess += math.floor((limit - here) / slope)
    raise AssertionError("unreachable")


def passes(request: PlanOptions, setup: Setup) -> int:
    """Number of forward and backward passes in a step."""
    if request.batch_tokens is None:
        return 1
    return -(-request.batch_tokens // (request.gpus * setup.micro_batch * request.context))


def choose(found: list[Option]) -> Option:
    """The best option: least communication, then no recomputation, then largest micro-batch, then lowest stage."""
    return min(found, key=lambda o: (o.communication, o.setup.checkpointing, -o.setup.micro_batch, o.setup.stage))


def why(chosen: Option) -> str:
    """The reason for the choice, and the configuration keys that select it."""
    again = "with activation checkpointing" if chosen.setup.checkpointing else "without activation checkpointing"
    return (
        f"*: least communication of those that fit (a GPU sends {chosen.communication / GIB:.3g} GiB a step), "
        f"{again}, then the largest micro-batch, then the lowest stage; train with zero.stage={chosen.setup.stage} "
        f"train.micro_batch_size={chosen.setup.micro_batch} "
        f"train.activation_checkpointing={str(chosen.setup.checkpointing).lower()}"
    )


def training_table(request: PlanOptions, found: list[Option], chosen: Option) -> str:
    """A table of memory by part in GiB, with a row for each of `setups`; * marks the chosen one."""
    known = {(option.setup.stage, option.setup.checkpointing): option for option in found}
    rows = []
    for setup in setups(request):
        option = known.get((setup.stage, setup.checkpointing))
        memory = training_memory(request.model, setup) if option is None else option.memory
        row: dict[str, Any] = {
            "": "*" if option is chosen else "",
            "ZeRO": setup.stage,
            "checkpointing": "yes" if setup.checkpointing else "no",
            "micro-batch": "none" if option is None else str(option.setup.micro_batch),
        }
        row |= {name: round(size / GIB, 3) for name, size in vars(memory).items()}
        reserve = request.memory * RESERVE / (1 - RESERVE)
        row |= {"reserve": round(reserve / GIB, 3), "sum with reserve": round((memory.total + reserve) / GIB, 2)}
        rows.append(row)
    notes = [] if len(found) == 8 else ["micro-batch none: one sequence does not fit; the row shows what it needs"]
    if any(option.setup.micro_batch == MOST for option in found):
        notes.append(f"micro-batch {MOST}: the search ends here; a larger one may fit")
    return "\n".join([format_table(rows), *notes])


def step_table(request: PlanOptions, chosen: Option, chips: list[Chip]) -> str:
    """Roofline of the chosen setup on each chip: the slower of arithmetic and memory traffic, plus communication."""
    setup, model, count = chosen.setup, request.model, passes(request, chosen.setup)
    cost = model.cost(setup.micro_batch, setup.tokens, setup.tokens)
    head = 2 * setup.micro_batch * setup.tokens * model.head.weight.numel()
    flops = count * (3 * cost.flops + (cost.flops - head if setup.checkpointing else 0))
    weights = setup.width * model.num_parameters()
    cut = setup.ranks if setup.stage else 1
    update = (weights + 3 * 8 * model.num_parameters()) // cut  # gradient; weight and two moments, read and written
    moved = count * (3 * weights + 2 * activation_memory(model, setup).kept) + update
    tokens = count * request.gpus * setup.micro_batch * setup.tokens
    rows = []
    for chip in chips:
        compute, traffic = flops / chip.flops(request.precision), moved / chip.bandwidth
        sending = chosen.communication / (chip.link if request.nodes == 1 else chip.network)
        seconds = max(compute, traffic) + sending
        rows.append(
            {
                "chip": chip.name,
                "arithmetic s": compute,
                "memory s": traffic,
                "communication s": sending,
                "step s at least": seconds,
                "tokens/s at most": tokens / seconds,
                "bound by": max((compute, "arithmetic"), (traffic, "memory"), (sending, "communication"))[1],
                "memory": "fits" if chosen.memory.total <= chip.memory * (1 - RESERVE) else "too small",
            }
        )
    text = (
        f"{tokens:,} tokens a step in {counted(count, 'pass', 'passes')}; {flops:.4g} FLOPs and "
        f"{moved / GIB:.4g} GiB of memory traffic a GPU; at peak speed, without overlap of communication"
    )
    return f"{format_table(rows)}\n{text}"


def least_memory(need: int) -> float:
    """GiB of a GPU that can use `need` bytes, rounded up to one decimal."""
    return math.ceil(10 * need / GIB / (1 - RESERVE)) / 10


def nothing_fits(request: PlanOptions) -> str:
    """The message when no setup fits: the missing memory, and the smallest single changes that would fit."""
    leanest = min(
        (setup for setup in setups(request) if setup.checkpointing),
        key=lambda s: training_memory(request.model, s).total,
    )
    memory = training_memory(request.model, leanest)
    largest_part = max(vars(memory), key=lambda name: getattr(memory, name))
    ways = [f"--gpu-memory {least_memory(memory.total)}"]
    for gpus in (request.gpus * 2**i for i in range(1, 13)):
        if training_memory(request.model, replace(leanest, ranks=gpus, stage=3)).total <= request.memory:
            ways.append(f"--gpus {gpus}")
            break
    longest = largest_within(
        request.memory,
        lambda n: training_memory(request.model, replace(leanest, tokens=n)).total,
        request.context - 1,
        0.02,
    )
    if longest:
        ways.append(f"--context {longest}")
    return (
        f"attnzoo plan: training does not fit: one sequence of {request.context:,} tokens needs "
        f"{memory.total / GIB:.2f} GiB with ZeRO {leanest.stage} and activation checkpointing, "
        f"{(memory.total - request.memory) / GIB:.2f} GiB more than a GPU has "
        f"({largest_part} alone {getattr(memory, largest_part) / GIB:.2f} GiB); any of these would fit: "
        + ", ".join(ways)
    )


def chip_table(chips: list[Chip]) -> str:
    """A table of the chips' peak numbers."""
    return format_table(
        [
            {
                "chip": chip.name,
                "TFLOP/s bf16": chip.bf16_flops / 1e12,
                "TFLOP/s fp32": chip.fp32_flops / 1e12,
                "memory TB/s": chip.bandwidth / 1e12,
                "memory GiB": round(chip.memory / GIB),
                "link GB/s": round(chip.link / 1e9),
                "network GB/s": round(chip.network / 1e9),
                "source": chip.source,
            }
            for chip in chips
        ]
    )
