"""`attnzoo plan`: estimates memory and speed of a model on a number of GPUs."""

import argparse
from pathlib import Path

from attnzoo.planner.chips import CHIPS, CPU

EXAMPLES = """examples:
  attnzoo plan --model rcmha.yaml --gpus 64 --gpu-memory 80 --context 131072
  attnzoo plan --model runs/demo --gpus 2 --gpu-memory 24 --chip h100
  attnzoo plan --model smollm2 --optimizer muon --batch-tokens 500000
  attnzoo plan --model smollm2 --context 8192 --cache "d2o keep_ratio=0.2" --cache think

exit status: 1 if training does not fit; the message says which changes would make it fit
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options and examples."""
    parser.description = (
        "Print the largest micro-batch of every ZeRO stage, the memory of a GPU by part, the shortest step time by "
        "roofline, and how many sequences a GPU can serve with exact and compressed caches."
    )
    parser.epilog = EXAMPLES
    parser.add_argument(
        "--model",
        required=True,
        type=Path,
        help="training config (a bare name is looked up in configs/), run, checkpoint or config.json, or a name",
    )
    parser.add_argument("--gpus", type=int, default=1, help="total number of GPUs (default: %(default)s)")
    parser.add_argument("--nodes", type=int, help="number of machines (default: one for every 8 GPUs)")
    parser.add_argument(
        "--gpu-memory", type=float, default=80.0, metavar="GIB", help="memory of one GPU (default: %(default)s)"
    )
    parser.add_argument("--context", type=int, help="tokens of a sequence (default: the model's max_positions)")
    parser.add_argument(
        "--cache",
        action="append",
        default=[],
        metavar="NAME",
        help='compressed cache to serve with as well, with its options: --cache "d2o keep_ratio=0.5"; can be repeated',
    )
    names = ", ".join([*CHIPS, CPU])
    parser.add_argument("--chip", action="append", help=f"{names}; can be repeated (default: all)")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"], help="(default: %(default)s)")
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "muon"], help="(default: %(default)s)")
    parser.add_argument("--batch-tokens", type=int, help="tokens of a step on all GPUs (default: one micro-batch each)")
    parser.add_argument("--vocab-size", type=int, help="tokens in the vocabulary (default: the config's number)")


def run(options: argparse.Namespace) -> int:
    """Prints the plan; exit status 1 if training does not fit. Raises ValueError for wrong usage."""
    from attnzoo.planner import plan

    return plan.run(options)
