"""Random models of transformers and of ours with the same functions, and how far their logits may be apart."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from attnzoo.checkpoint import load_model
from attnzoo.checkpoint.huggingface_export import family_config
from attnzoo.models import DecoderConfig, DecoderLM
from tests.helpers import serving
from train.config_reader import load_config

SIZES = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "attn_implementation": "eager",
}

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

CASES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-mha-tied": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 6, "tie_word_embeddings": True}),
    "llama-mqa-biases": (
        LlamaConfig,
        LlamaForCausalLM,
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-5},
    ),
    "llama3-scaling": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3, "head_dim": 16}),
    "llama-linear-scaling": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "mistral-window": (MistralConfig, MistralForCausalLM, {"sliding_window": 9, "head_dim": 10}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen2-windows": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 20, "tie_word_embeddings": True}),
    "qwen3-biases": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8, "attention_bias": True}),
}

ROUNDINGS = 8
"""Sums of some hundred products in another order end so many roundings apart (the square root of their number)."""


@torch.no_grad()
def bound(model: Any, ids: torch.Tensor, **inputs: Any) -> float:
    """How far from the model's logits another order of sums may lead: so many times what one rounding of every weight
    moves them by. That is their size and their condition in one: what a layer amplifies counts amplified."""
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for parameter in moved.parameters():
        sign = torch.randint(2, parameter.shape, generator=generator) * 2 - 1
        parameter.mul_(1 + torch.finfo(torch.float32).eps * sign)
    return ROUNDINGS * (moved(ids, **inputs).logits - model(ids, **inputs).logits).abs().max().item()


def reference(case: str, **changes: Any) -> Any:
    """A random model of transformers; norms, biases and everything else that starts at one or zero is drawn too."""
    config_class, model_class, options = CASES[case]
    torch.manual_seed(3)
    model = model_class(config_class(**SIZES | options | changes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
        elif "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.requires_grad_(False)


def saved(case: str, directory: Path, **options: Any) -> tuple[Any, DecoderLM]:
    """The model of a case, saved by transformers, and what is loaded of it here."""
    model = reference(case)
    model.save_pretrained(directory, **options)
    return model, load_model(directory)


def change(directory: Path, **changes: Any) -> None:
    """Other values in a config.json; None takes a key out."""
    path = directory / "config.json"
    content = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            content.pop(key)
        else:
            content[key] = value
    path.write_text(json.dumps(content))


def tokens(*shape: int, seed: int = 5) -> torch.Tensor:
    """Random ids of the vocabulary of `SIZES`."""
    return torch.randint(SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def demo_model(**changes: Any) -> DecoderLM:
    """configs/mha.yaml with the vocabulary of the tests' tokenizer; all that starts at one or zero is drawn."""
    values = load_config("mha.yaml").model | {"vocab_size": serving.TOKENS, "init_std": 0.1} | changes
    torch.manual_seed(7)
    model = DecoderLM(DecoderConfig.from_dict(values)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
        elif "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def check_same_model(one: DecoderLM, other: DecoderLM) -> None:
    """The same function in the same numbers; only the spelling of the configuration may differ."""
    assert family_config(one.config) == family_config(other.config)
    assert one.config.init_std == other.config.init_std
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name
