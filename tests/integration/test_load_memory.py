"""Loading takes at most 1.2 times the model's memory, whatever the file's format and dtype."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers.gguf_files import smollm2

ROOT = Path(__file__).resolve().parents[2]
MOST = 1.2


def grown(path: Path, dtype: str) -> float:
    command = [sys.executable, "-m", "tests.helpers.load_run", str(path), dtype]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    numbers = json.loads(result.stdout.splitlines()[-1])
    ratio = numbers["peak"] / numbers["model"]
    print(f"{path.name} {dtype}: model {numbers['model'] / 2**20:.0f} MiB, peak {ratio:.3f} of it")
    return ratio


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Some 300 million bytes in one file, a fifth of them one tensor, and the same in shards."""
    root = tmp_path_factory.mktemp("models")
    config = LlamaConfig(
        vocab_size=30_000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=9,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = {name: torch.zeros(p.shape, dtype=torch.bfloat16) for name, p in model.named_parameters()}
    files = {"one": dict.fromkeys(weights, "model.safetensors")}
    files["shards"] = {name: f"model-{number % 4}.safetensors" for number, name in enumerate(weights)}
    for kind, places in files.items():
        config.save_pretrained(root / kind)
        for file in set(places.values()):
            save_file({name: weights[name] for name in weights if places[name] == file}, root / kind / file)
    (root / "shards" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files["shards"]}))
    return root


@pytest.mark.parametrize(("kind", "dtype"), [("one", "float32"), ("shards", "bfloat16")])
def test_directories(directory, kind, dtype):
    """As stored, and in another dtype."""
    assert grown(directory / kind, dtype) <= MOST


def test_gguf():
    assert grown(smollm2(), "float32") <= MOST
