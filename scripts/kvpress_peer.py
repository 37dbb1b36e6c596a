"""Runs kvpress on the same weights and tokens; `scripts.bench_cache` starts it in another Python environment.

    python scripts/kvpress_peer.py work.json result

kvpress needs an older transformers than this project, so it has an environment of its own (pip install kvpress) and
exchanges only files with the caller.
work.json has "kind", "model" (a directory), and for each kind:

- retrieval: "ratio" (share of the prompt's tokens to drop), "presses" (names), "items": [{"prompt": [tokens], "forced":
  [tokens], "spans": [[start, end of an answer in forced], ...]}]. Result, JSON: {press: {"right": [[true or false a
  span], ...], "nbytes": [bytes of the compressed cache an item]}}.
- logits: "ratio", "presses", "prompts": [[tokens], ...], "forced": [[tokens], ...]. Result, safetensors: for each press
  [N, T, V], the logits after each forced token.
- scores: "prompt": [tokens], "window": queries, "pool": neighbours. Result, safetensors, for every layer l: queries.l
  [1, N, W, H] and keys.l [1, K, S, H] after rotation, rank.l [1, K, H] (rank of a channel in the order in which
  ThinKPress prunes), snapkv.l [1, K, S - W] (scores of SnapKVPress).
"""

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kvpress import (
    ExpectedAttentionPress,
    KnormPress,
    ObservedAttentionPress,
    SnapKVPress,
    StreamingLLMPress,
    ThinKPress,
    TOVAPress,
)
from kvpress.presses.base_press import BasePress
from safetensors.torch import save_file
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


class Recorder(BasePress):
    """A press that compresses nothing, but records the scores of ThinKPress and SnapKVPress for every layer."""

    def __init__(self, window: int, pool: int) -> None:
        self.window, self.pool = window, pool
        self.found: dict[str, torch.Tensor] = {}

    def compress(
        self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        width = keys.shape[-1]
        think = ThinKPress(window_size=self.window)
        pruned = torch.zeros(keys.shape[0], keys.shape[1], width, dtype=torch.int64)
        for count in range(1, width):
            # Half a channel is added, so that rounding cannot remove one.
            think.key_channel_compression_ratio = (count + 0.5) / width
            thin, _ = think.compress(module, hidden_states, keys.clone(), values, attentions, kwargs)
            pruned += (thin == 0).all(dim=2)
        snapkv = SnapKVPress(window_size=self.window, kernel_size=self.pool)
        scores = snapkv.score(module, hidden_states, keys, values, None, kwargs)
        layer = module.layer_idx
        queries = think.compute_window_queries(module, kwargs["hidden_states"], kwargs["position_embeddings"])
        self.found[f"queries.{layer}"] = queries.contiguous()
        self.found[f"keys.{layer}"] = keys.clone()
        self.found[f"rank.{layer}"] = width - 1 - pruned
        self.found[f"snapkv.{layer}"] = scores[..., : -self.window].contiguous()
        return keys, values


def load(directory: str, attention: str) -> Any:
    """The exported model."""
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation=attention, use_safetensors=True
    ).eval()


@torch.no_grad()
def pressed(model: Any, press: Any, prompt: list[int], forced: list[int]) -> tuple[torch.Tensor, int]:
    """(logits_TV after every forced token, bytes of the compressed cache). The prompt's cache is compressed, and the
    forced tokens follow at their original positions."""
    cache: Any = DynamicCache()
    with press(model):
        model.model(input_ids=torch.tensor([prompt]), past_key_values=cache)
    nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    positions = torch.arange(len(prompt), len(prompt) + len(forced))[None]
    return model(input_ids=torch.tensor([forced]), past_key_values=cache, position_ids=positions).logits[0], nbytes


def run_item(model: Any, press: Any, item: dict[str, Any]) -> tuple[list[bool], int]:
    """(whether each span is predicted correctly, bytes of the compressed cache)."""
    forced = item["forced"]
    logits_TV, nbytes = pressed(model, press, item["prompt"], forced)
    guesses = logits_TV.argmax(-1).tolist()
    return [guesses[start - 1 : end - 1] == forced[start:end] for start, end in item["spans"]], nbytes


def each_press(work: dict[str, Any]) -> Iterator[tuple[str, Any, Callable[[], Any]]]:
    """Yields (name, model, function that makes the press) for each press in `work`."""
    models = {attention: load(work["model"], attention) for attention in ("sdpa", "eager")}
    for name in work["presses"]:
        yield (
            name,
            models["eager" if name in EAGER else "sdpa"],
            partial(PRESSES[name], compression_ratio=work["ratio"]),
        )


def retrieval(work: dict[str, Any], path: Path) -> None:
    """Writes the retrieval answers of every press."""
    result = {}
    for name, model, make in each_press(work):
        found = [run_item(model, make(), item) for item in work["items"]]
        result[name] = {"right": [right for right, _ in found], "nbytes": [nbytes for _, nbytes in found]}
    path.write_text(json.dumps(result), encoding="utf-8")


def logits(work: dict[str, Any], path: Path) -> None:
    """Writes the logits of every press."""
    texts = list(zip(work["prompts"], work["forced"], strict=True))
    found = {
        name: torch.stack([pressed(model, make(), prompt, forced)[0] for prompt, forced in texts])
        for name, model, make in each_press(work)
    }
    save_file(found, path)


@torch.no_grad()
def scores(work: dict[str, Any], path: Path) -> None:
    """Writes the scores for one prompt."""
    model, recorder = load(work["model"], "sdpa"), Recorder(work["window"], work["pool"])
    with recorder(model):
        model.model(input_ids=torch.tensor([work["prompt"]]), past_key_values=DynamicCache())
    save_file(recorder.found, path)


def main(arguments: list[str]) -> int:
    """Reads the work and writes the result; returns the exit status."""
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    logging.disable_progress_bar()
    work = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    {"retrieval": retrieval, "logits": logits, "scores": scores}[work["kind"]](work, Path(arguments[1]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
