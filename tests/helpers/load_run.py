"""Loads a checkpoint in a process of its own and prints how memory grew: python -m tests.helpers.load_run PATH DTYPE"""

import json
import sys
from pathlib import Path

import torch

from attnzoo.checkpoint import load_model
from attnzoo.models import DecoderConfig, DecoderLM
from attnzoo.types import parse_dtype


def memory(field: str) -> int:
    """Bytes by /proc: VmRSS now, VmHWM the most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(field)


def main(path: str, dtype: str) -> None:
    import gguf  # noqa: F401 - what is imported once is not the checkpoint's

    tiny = DecoderLM(DecoderConfig(vocab_size=64, model_dim=32, num_layers=1, attention="mha"))
    tiny(torch.zeros(1, 4, dtype=torch.long))
    before = memory("VmRSS")
    model = load_model(Path(path), dtype=parse_dtype(dtype))
    size = sum(parameter.nbytes for parameter in model.parameters())
    print(json.dumps({"model": size, "peak": memory("VmHWM") - before}))


if __name__ == "__main__":
    main(*sys.argv[1:])
