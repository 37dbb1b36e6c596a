"""`attnzoo plan`: what fits on so many GPUs, and how fast it can be."""

import argparse
from pathlib import Path

from attnzoo.planner.chips import CHIPS, CPU

EXAMPLES = """examples:
  attnzoo plan --model rcmha.yaml --gpus 64 --gpu-memory 80 --context 131072
  attnzoo plan --model runs/demo --gpus 2 --gpu-memory 24 --chip h100
  attnzoo plan --model smollm2 --optimizer muon --batch-tokens 500000

exit status: 1 when nothing fits; the message says what would
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options and examples."""
    parser.description = (
        "The largest micro-batch of every ZeRO stage, the memory of a GPU by part, the least time of a step by "
        "roofline, and how many sequences a GPU serves at each cache policy."
    )
    parser.epilog = EXAMPLES
    parser.add_argument(
        "--model",
        required=True,
        type=Path,
        help="training config (a bare name is looked up in configs/), checkpoint directory or config.json",
    )
    parser.add_argument("--gpus", type=int, default=1, help="GPUs in all (default: %(default)s)")
    parser.add_argument("--nodes", type=int, help="machines they are in (default: 8 GPUs a machine)")
    parser.add_argument("--gpu-memory", type=float, default=80.0, metavar="GIB", help="of one (default: %(default)s)")
    parser.add_argument("--context", type=int, help="tokens of a sequence (default: the model's max_positions)")
    names = ", ".join([*CHIPS, CPU])
    parser.add_argument("--chip", action="append", help=f"{names}; may be given again (default: all)")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"], help="(default: %(default)s)")
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "muon"], help="(default: %(default)s)")
    parser.add_argument("--batch-tokens", type=int, help="tokens of a step over all GPUs (default: one pass)")
    parser.add_argument("--vocab-size", type=int, help="where the tokenizer decides (default: the config's)")


def run(options: argparse.Namespace) -> int:
    """Prints the plan; exit status 1 when nothing fits. Raises ValueError for wrong usage."""
    from attnzoo.planner import plan

    return plan.run(options)
