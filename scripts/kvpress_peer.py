"""The presses of kvpress on the same weights and tokens: run by `scripts.bench_cache` under an interpreter of its own.

    python scripts/kvpress_peer.py work.json result.json

kvpress needs an older transformers than this project, so it lives in an environment of its own (pip install kvpress)
and shares nothing with the caller but files.
work: {"model": directory, "ratio": share of the prompt's tokens to drop, "presses": [names], "items": [{"prompt":
[tokens], "forced": [tokens], "spans": [[start, end of an answer in forced], ...]}]}.
result: {press: {"right": [[true or false a span], ...], "nbytes": [bytes of the compressed cache an item]}}.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from kvpress import (
    ExpectedAttentionPress,
    KnormPress,
    ObservedAttentionPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

PRESSES = {
    "SnapKVPress": SnapKVPress,
    "ObservedAttentionPress": ObservedAttentionPress,
    "TOVAPress": TOVAPress,
    "ExpectedAttentionPress": ExpectedAttentionPress,
    "KnormPress": KnormPress,
    "StreamingLLMPress": StreamingLLMPress,
}
EAGER = ("ObservedAttentionPress",)
"""Presses that need the attention weights, which fused kernels do not return."""


@torch.no_grad()
def run_item(model: Any, press: Any, item: dict[str, Any]) -> tuple[list[bool], int]:
    """(right by span, bytes of the compressed cache): the prompt is pressed, then tokens follow at their positions."""
    prompt, forced = item["prompt"], item["forced"]
    cache = DynamicCache()
    with press(model):
        model.model(input_ids=torch.tensor([prompt]), past_key_values=cache)
    nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    positions = torch.arange(len(prompt), len(prompt) + len(forced))[None]
    logits = model(input_ids=torch.tensor([forced]), past_key_values=cache, position_ids=positions).logits
    guesses = logits[0].argmax(-1).tolist()
    return [guesses[start - 1 : end - 1] == forced[start:end] for start, end in item["spans"]], nbytes


def main(arguments: list[str]) -> int:
    """Reads the work, writes the result."""
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    logging.disable_progress_bar()
    work = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    models = {
        attention: AutoModelForCausalLM.from_pretrained(
            work["model"], dtype=torch.float32, attn_implementation=attention
        ).eval()
        for attention in ("sdpa", "eager")
    }
    result = {}
    for name in work["presses"]:
        model = models["eager" if name in EAGER else "sdpa"]
        found = []
        for number, item in enumerate(work["items"], 1):
            found.append(run_item(model, PRESSES[name](compression_ratio=work["ratio"]), item))
            if number % 20 == 0 or number == len(work["items"]):
                print(f"kvpress {name}: {number}/{len(work['items'])}", file=sys.stderr, flush=True)
        result[name] = {"right": [right for right, _ in found], "nbytes": [nbytes for _, nbytes in found]}
    Path(arguments[1]).write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
