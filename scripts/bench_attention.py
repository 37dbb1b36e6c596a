"""`attnzoo bench attention`: time and memory of training and time of decoding, against torch's attention."""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.attention import build_attention, streaming
from attnzoo.cli import carry_out
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.linear_attention import linear_attention
from attnzoo.ops.relative_sdpa import relative_sdpa
from attnzoo.ops.sdpa import sdpa
from attnzoo.ops.sinusoid_sdpa import sinusoid_sdpa
from attnzoo.profiling.memory import peak_bytes
from attnzoo.report import Claim, Report
from scripts import arguments

BUSY = 0.75
"""A higher load average makes timings unreliable."""
HEADS, HEAD_DIM, MODEL_DIM = 8, 64, 512
PEAK, PEAKED_DECAY = 5.0, 0.2
MIB = 2**20

Function = Callable[[], Tensor]


def tensors(tokens: int, peak: float = 1.0) -> dict[str, Tensor]:
    """q, k and v of one sequence, and the parameters of relative attention, all with gradients. peak: factor of queries
    and keys; with 5, scores have a standard deviation of 25, and a fifth of the softmax weights would be denormal."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        **dict.fromkeys("qkv", (1, HEADS, tokens, HEAD_DIM)),
        "u": (HEADS, HEAD_DIM),
        "table": (HEADS, tokens, HEAD_DIM),
        "table_bias": (HEADS, tokens),
        "position_bias": (HEADS, HEAD_DIM),
        "weight": (HEADS, HEAD_DIM, MODEL_DIM),
    }
    sizes = {"q": peak, "k": peak}
    return {
        name: (torch.randn(*shape, generator=generator) * sizes.get(name, 1.0)).requires_grad_()
        for name, shape in shapes.items()
    }


def eager_table(t: dict[str, Tensor]) -> Tensor:
    """Relative attention with Transformer-XL's shift of the whole score matrix: pad a column, reshape, drop a row."""
    tokens = t["q"].shape[2]
    relative = t["q"] @ t["table"].flip(1).mT + t["table_bias"].flip(1)[:, None]
    shifted = F.pad(relative, (1, 0)).view(1, HEADS, tokens + 1, tokens)[:, :, 1:]
    scores = (t["q"] + t["u"][:, None]) @ t["k"].mT + shifted
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    return (scores * HEAD_DIM**-0.5).masked_fill(hidden, float("-inf")).softmax(-1) @ t["v"]


def labml_table(tokens: int) -> Function | None:
    """Relative attention with the scores of labml-nn's module; None if labml-nn is not installed."""
    if importlib.util.find_spec("labml_nn") is None:
        return None
    from labml_nn.transformers.xl.relative_mha import RelativeMultiHeadAttention

    module = RelativeMultiHeadAttention(HEADS, MODEL_DIM, 0.0)
    q, k, v = (torch.randn(tokens, 1, HEADS, HEAD_DIM).requires_grad_() for _ in range(3))

    def run() -> Tensor:
        scores = module.get_scores(q, k) * HEAD_DIM**-0.5
        hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)[:, :, None, None]
        out: Tensor = torch.einsum("ijbh,jbhd->ibhd", scores.masked_fill(hidden, float("-inf")).softmax(1), v)
        return out

    return run


def training_contenders(t: dict[str, Tensor]) -> dict[str, Function]:
    """Forward passes by name; the others are compared with the first."""
    tokens, qkv = t["q"].shape[2], (t["q"], t["k"], t["v"])
    table: dict[str, Any] = {"content_bias_NH": t["u"], "table_NPH": t["table"], "table_bias_NP": t["table_bias"]}
    waves: dict[str, Any] = {
        "content_bias_NH": t["u"],
        "position_bias_NH": t["position_bias"],
        "weight_NHD": t["weight"],
    }
    contenders: dict[str, Function] = {
        "MHA (torch SDPA)": lambda: sdpa(*qkv),
        "RMHA table": lambda: relative_sdpa(*qkv, **table),
        "RMHA sinusoid": lambda: sinusoid_sdpa(*qkv, **waves),
        "RMHA table, window 256": lambda: relative_sdpa(*qkv, mask=Mask(window=256), **table),
        "linear": lambda: linear_attention(t["q"].sigmoid(), t["k"].sigmoid(), t["v"], normalise=True)[0],
        "table, eager": lambda: eager_table(t),
    }
    peer = labml_table(tokens)
    return contenders if peer is None else contenders | {"table, labml-nn": peer}


def with_backward(function: Function) -> Callable[[], None]:
    """The function with its backward pass, from a gradient of ones."""

    def run() -> None:
        out = function()
        out.backward(torch.ones_like(out))

    return run


def take_turns(
    functions: dict[str, Callable[[], Any]],
    turns: int,
    clock: Callable[[], float] = time.perf_counter,
    typical: Callable[[list[float]], float] = statistics.median,
) -> dict[str, float]:
    """Seconds of each function after a warm-up, by default their median; they take turns, so that changes of speed
    affect all, forwards and backwards, since what ran before leaves its data in the caches."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(turns + 1):
        for name, function in list(functions.items())[:: -1 if turn % 2 else 1]:
            begin = clock()
            function()
            if turn:
                seconds[name].append(clock() - begin)
    return {name: typical(values) for name, values in seconds.items()}


def training(report: Report, tokens: int, turns: int) -> dict[str, dict[str, float]]:
    """Milliseconds and peak MiB of forward and backward, by name; adds rows to the report."""
    t = tensors(tokens)
    contenders = {name: with_backward(f) for name, f in training_contenders(t).items()}
    found: dict[str, dict[str, float]] = {}
    for name, seconds in take_turns(contenders, turns).items():
        for tensor in t.values():
            tensor.grad = None
        found[name] = {"ms": seconds * 1e3, "MiB": peak_bytes(contenders[name]) / MIB}
    base = found["MHA (torch SDPA)"]["ms"]
    for name, row in found.items():
        report.rows.append(
            {"what": "forward + backward", "T": tokens, "contender": name, **row, "x MHA": row["ms"] / base}
        )
    return found


def peaked(report: Report, tokens: int, turns: int) -> dict[str, float]:
    """Time of forward and backward on inputs that produce denormal numbers, relative to usual inputs, by name."""
    names = ("MHA (torch SDPA)", "RMHA table", "RMHA sinusoid", "RMHA table, window 256")
    runs: dict[str, Callable[[], None]] = {}
    for kind, peak, decay in (("calm", 1.0, 0.97), ("peaked", PEAK, PEAKED_DECAY)):
        t = tensors(tokens, peak)
        contenders = {name: training_contenders(t)[name] for name in names} | {"linear, decayed": _decayed(t, decay)}
        runs |= {f"{name}, {kind}": with_backward(run) for name, run in contenders.items()}
    found = take_turns(runs, turns)
    for name, seconds in found.items():
        report.rows.append({"what": "forward + backward", "T": tokens, "contender": name, "ms": seconds * 1e3})
    return {name: found[f"{name}, peaked"] / found[f"{name}, calm"] for name in (*names, "linear, decayed")}


def _decayed(t: dict[str, Tensor], decay: float) -> Function:
    decay_K = torch.full((HEADS,), decay)
    return lambda: linear_attention(t["q"].sigmoid(), t["k"].sigmoid(), t["v"], decay_K=decay_K)[0]


def flex_forward(report: Report, tokens: int, turns: int) -> None:
    """Measures the forward pass against flex_attention, which torch compiles for a CPU without a backward pass."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    t = {name: tensor.detach() for name, tensor in tensors(tokens).items()}
    mask = create_block_mask(lambda b, n, i, j: i >= j, None, None, tokens, tokens, device="cpu")
    flex = torch.compile(flex_attention)
    contenders: dict[str, Function] = {
        "MHA (torch SDPA)": lambda: sdpa(t["q"], t["k"], t["v"]),
        "MHA (flex_attention)": lambda: flex(t["q"], t["k"], t["v"], block_mask=mask),
        "RMHA table": training_contenders(t)["RMHA table"],
    }
    with torch.no_grad():
        for name, seconds in take_turns(contenders, turns).items():
            report.rows.append({"what": "forward", "T": tokens, "contender": name, "ms": seconds * 1e3})


def decoding(report: Report, context: int, turns: int) -> dict[str, float]:
    """Microseconds of decoding one token of one sequence in a layer with `context` tokens in its cache, by variant."""
    variants: dict[str, dict[str, Any]] = {
        "mha": {},
        "rmha": {"max_distance": context},
        "rmha sinusoid": {"position": "sinusoid"},
        "mdha": {},
        "rcmha": {"max_distance": context},
        "linear": {},
    }
    steps = {}
    for name, options in variants.items():
        torch.manual_seed(0)
        built = build_attention(name.split()[0], {"model_dim": MODEL_DIM, "num_heads": HEADS, **options})
        layer = streaming(built.eval())
        state = layer.init_state(1, context + turns + 2)
        with torch.no_grad():
            _, state = layer.extend(torch.randn(1, context, MODEL_DIM), state)
        steps[name] = _decoder(layer, state)
    with torch.no_grad():
        found = {name: seconds * 1e6 for name, seconds in take_turns(steps, turns).items()}
    for name, microseconds in found.items():
        report.rows.append(
            {
                "what": "decode, one token",
                "T": context,
                "contender": name,
                "us": microseconds,
                "x MHA": microseconds / found["mha"],
            }
        )
    return found


def _decoder(layer: Any, state: Any) -> Callable[[], None]:
    x = torch.randn(1, 1, MODEL_DIM)
    held = [state]

    def step() -> None:
        _, held[0] = layer.extend(x, held[0])

    return step


def linear_growth(report: Report, tokens: int, turns: int) -> tuple[float, float]:
    """(time of linear attention at 2T relative to T, time of SDPA relative to linear attention at 2T)."""
    runs: dict[str, Callable[[], None]] = {}
    for length in (tokens, 2 * tokens):
        contenders = training_contenders(tensors(length))
        runs[f"linear {length}"] = with_backward(contenders["linear"])
    runs["MHA"] = with_backward(contenders["MHA (torch SDPA)"])
    found = take_turns(runs, turns)
    short, long = found[f"linear {tokens}"], found[f"linear {2 * tokens}"]
    for name, length, seconds in (
        ("linear", tokens, short),
        ("linear", 2 * tokens, long),
        ("MHA (torch SDPA)", 2 * tokens, found["MHA"]),
    ):
        report.rows.append({"what": "forward + backward", "T": length, "contender": name, "ms": seconds * 1e3})
    return long / short, found["MHA"] / long


def memory_growth(tokens: int) -> dict[str, float]:
    """Peak bytes of relative attention at 2T relative to T, by name."""
    peaks: dict[str, list[int]] = {"RMHA table": [], "RMHA sinusoid": []}
    for length in (tokens, 2 * tokens):
        contenders = training_contenders(tensors(length))
        for name, values in peaks.items():
            run = with_backward(contenders[name])
            run()  # the first call also allocates constants that all calls share
            values.append(peak_bytes(run))
    return {name: large / small for name, (small, large) in peaks.items()}


def run(options: argparse.Namespace) -> int:
    """Measures and prints a table; exit status 1 if a claim does not hold. Raises ValueError for wrong usage."""
    arguments.check_counts(options)
    torch.set_num_threads(options.threads)
    report = Report.start(command=options.command, quick=options.quick)
    if report.load_before > BUSY:
        print(f"load average {report.load_before} is above {BUSY}: timings may be unreliable", file=sys.stderr)
    tokens, turns = (256, 2) if options.quick else (2048, options.turns)
    found = training(report, tokens, turns)
    peaks = peaked(report, tokens, max(turns // 2, 2))
    flex_forward(report, tokens, turns)
    growth, lead = linear_growth(report, 2 * tokens, max(turns // 2, 2))
    memory = memory_growth(tokens)
    decode = decoding(report, 2 * tokens, 3 * turns)
    report.claims += claims(found, peaks, growth, lead, memory, decode)
    report.print_table()
    if options.json:
        report.write(options.json)
    return report.exit_status()


def claims(
    found: dict[str, dict[str, float]],
    peaks: dict[str, float],
    growth: float,
    lead: float,
    memory: dict[str, float],
    decode: dict[str, float],
) -> list[Claim]:
    """The claims about one run."""
    eager = found.get("table, labml-nn", found["table, eager"])
    table, sinusoid, mha = (found[name] for name in ("RMHA table", "RMHA sinusoid", "MHA (torch SDPA)"))
    made = [
        Claim(name="table: share of the eager form's memory", expected=1 / 8, measured=table["MiB"] / eager["MiB"]),
        Claim(
            name="table: times the eager form's speed", expected=2, measured=eager["ms"] / table["ms"], kind="at_least"
        ),
        Claim(name="table: times MHA's time", expected=2.5, measured=table["ms"] / mha["ms"]),
        Claim(name="sinusoid: times MHA's time", expected=2.5, measured=sinusoid["ms"] / mha["ms"]),
        Claim(name="linear: time at twice the length", expected=2.2, measured=growth),
        Claim(name="linear: times faster than MHA at the longer one", expected=8, measured=lead, kind="at_least"),
    ]
    made += [
        Claim(name=f"{name}: time on peaked inputs over time on calm ones", expected=1.75, measured=ratio)
        for name, ratio in peaks.items()
    ]
    made += [
        Claim(name=f"{name}: memory at twice the length", expected=2, tolerance=0.1, measured=ratio)
        for name, ratio in memory.items()
    ]
    made += [
        Claim(name=f"decode {name}: times MHA's time", expected=1.5, measured=time / decode["mha"])
        for name, time in decode.items()
        if name != "mha"
    ]
    return made


def main(words: list[str] | None = None) -> int:
    """Runs `attnzoo bench attention`; returns the exit status."""
    return carry_out(
        "attnzoo bench attention", arguments.bench_attention, run, sys.argv[1:] if words is None else words
    )


if __name__ == "__main__":
    sys.exit(main())
