"""What a config.json leaves out is what transformers takes for it, and what it contradicts is refused."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from attnzoo.checkpoint import load_model, open_checkpoint
from attnzoo.checkpoint.families import DEFAULTS, FamilyConfig
from tests.helpers.open_weights import bound, change, reference, saved, tokens

CLASSES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
NAMED = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
"""Sizes that have a default in transformers and must be in the file here."""
HARMLESS = {"use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "pretraining_tp"}
"""Keys of the classes that do not change the function of a loaded model."""
CHECKED = {"hidden_act"}
"""Keys whose default is the one value that is read here (`families.UNSUPPORTED`)."""
OLDER = {"rope_theta", "rope_scaling", "original_max_position_embeddings"}
"""Keys that transformers takes without a field for them."""
NOT_THEIRS = {
    "llama": {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"},
    "mistral": {"use_sliding_window", "max_window_layers", "attention_bias", "mlp_bias", "layer_types"},
    "qwen2": {"attention_bias", "mlp_bias", "head_dim"},
    "qwen3": {"mlp_bias"},
}
"""Fields that a family's class does not have."""


@pytest.mark.parametrize("family", CLASSES)
def test_every_default_is_transformers_own(family):
    """A new key or another default in a release of transformers shows here."""
    cls = CLASSES[family]
    base = {field.name for field in dataclasses.fields(PreTrainedConfig)} - {"tie_word_embeddings"}
    theirs = {field.name: field.default for field in dataclasses.fields(cls) if field.name not in base}
    ours = FamilyConfig.read({"model_type": family, **dict.fromkeys(NAMED, 8), "num_hidden_layers": 2})
    known = {field.name for field in dataclasses.fields(FamilyConfig)} - {"model_type"}
    assert theirs.keys() - known == (HARMLESS | CHECKED) & theirs.keys()
    assert known - theirs.keys() == NOT_THEIRS[family] | OLDER
    for name in known & theirs.keys() - set(NAMED):
        assert getattr(ours, name) == theirs[name], name
    assert ours.rope_theta == cls.default_theta
    assert cls.default_rope_type == "default"
    assert set(DEFAULTS[family]) <= known


SMALL = {"hidden_size": 64, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 131}
# What the file leaves out, and the sizes under which its default can be had.
LEFT_OUT = {
    "mistral-kv-heads": ("mistral", ["num_key_value_heads"], {"num_attention_heads": 16, "num_key_value_heads": 8}),
    "mistral-head-dim": ("mistral", ["head_dim"], {}),
    "llama-kv-heads": ("llama", ["num_key_value_heads"], {"num_key_value_heads": 6}),
    "llama-head-dim": ("llama", ["head_dim"], {}),
    "qwen3-head-dim": ("qwen3", ["head_dim"], {"head_dim": 128}),
    "qwen3-kv-heads": ("qwen3", ["num_key_value_heads"], {"num_attention_heads": 32, "num_key_value_heads": 32}),
    "qwen2-kv-heads": ("qwen2", ["num_key_value_heads"], {"num_attention_heads": 32, "num_key_value_heads": 32}),
    "qwen2-no-use": ("qwen2", ["use_sliding_window", "layer_types"], {"use_sliding_window": False}),
    "eps": ("llama", ["rms_norm_eps"], {"rms_norm_eps": 1e-6}),
    "rope": ("llama", ["rope_parameters"], {}),
    "positions": ("llama", ["max_position_embeddings"], {}),
    "positions-llama3": ("llama3-scaling", ["max_position_embeddings"], {}),
}


def check_against(directory: Path, *shape: int) -> None:
    """Logits are those of transformers reading the same files."""
    theirs = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    ours, ids = load_model(directory), tokens(*shape)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=bound(theirs, ids))


def write(directory: Path, case: str, without=(), keys=None, **options) -> None:
    """A random model, and then config.json without some keys and with others."""
    if options.get("num_attention_heads", 6) > 6:
        options |= SMALL
    reference(case, **options).save_pretrained(directory)
    path = directory / "config.json"
    content = {key: value for key, value in json.loads(path.read_text()).items() if key not in without}
    path.write_text(json.dumps(content | (keys or {})))


@pytest.mark.parametrize("case", LEFT_OUT)
def test_keys_left_out(case, tmp_path):
    family, without, options = LEFT_OUT[case]
    write(tmp_path, family, without, **options)
    check_against(tmp_path, 2, 31)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_windows_left_out_have_4096_tokens(family, tmp_path):
    """Longer than that, so that it shows."""
    switched = {} if family == "mistral" else {"use_sliding_window": True, "max_window_layers": 0}
    sizes = {
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "hidden_size": 8,
        "head_dim": 8,
    }
    write(
        tmp_path,
        family,
        ["sliding_window"],
        {"use_sliding_window": True} if switched else {},
        **sizes,
        **switched,
        max_position_embeddings=8192,
    )
    assert open_checkpoint(tmp_path).config.layer_attention(0)[1]["window"] == 4096
    ids = tokens(1, 4200)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    close = bound(theirs, ids)
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path)(ids), theirs(ids).logits, rtol=0, atol=close)
        change(tmp_path, sliding_window=8000)
        assert not torch.allclose(load_model(tmp_path)(ids), theirs(ids).logits, rtol=0, atol=close)


def test_qwen_windows_begin_at_layer_28(tmp_path):
    content = {"model_type": "qwen3", **dict.fromkeys(NAMED, 8), "num_hidden_layers": 30, "num_key_value_heads": 8}
    layers = FamilyConfig.read(content | {"use_sliding_window": True}).decoder().attention
    assert [layer["window"] for layer in layers] == [None] * 28 + [4096] * 2
    assert Qwen3Config(**content | {"use_sliding_window": True}).layer_types == [
        "full_attention" if layer["window"] is None else "sliding_attention" for layer in layers
    ]


TYPES = ["full_attention", "sliding_attention", "sliding_attention"]
KEYS = {
    "mistral-layer-types": ("mistral-window", {"layer_types": TYPES}),
    "mistral-all-full": ("mistral-window", {"layer_types": TYPES[:1] * 3}),
    "mistral-null-types": ("mistral-window", {"layer_types": None}),
    "qwen-types-against-numbers": ("qwen2-windows", {"layer_types": TYPES[::-1], "max_window_layers": 3}),
    "older-type-name": ("qwen3", {"layer_types": ["attention"] * 3}),
    "keys-of-others": ("mistral", {"attention_bias": True, "mlp_bias": True, "use_sliding_window": True}),
    "qwen-bias-key": ("qwen2", {"attention_bias": True}),
    "llama-unused-window": ("llama", {"sliding_window": 7, "use_sliding_window": False}),
    "theta-in-both-places": ("llama", {"rope_theta": 77.0, "rope_parameters": {"rope_theta": 9.0}}),
    "theta-outside": ("llama", {"rope_theta": 77.0, "rope_parameters": {"rope_type": "default"}}),
    "older-place-wins": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_theta": 9.0}},
    ),
    "nulls-in-rope": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 9, "factor": None}}),
    "positions-before": (
        "llama",
        {
            "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "original_max_position_embeddings": 40,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", KEYS)
def test_keys_mean_what_they_mean_there(case, tmp_path):
    family, keys = KEYS[case]
    write(tmp_path, family, keys=keys)
    check_against(tmp_path, 2, 67)


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        (
            "qwen3",
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5.0}}},
            r"rope_parameters.full_attention=.*one rule for each layer type is not supported",
        ),
        ("llama", {"rope_parameters": {"full_attention": {}}}, r"one rule for each layer type"),
        ("llama", {"rope_scaling": {"factor": 4.0}}, r"rope_scaling.factor=4.0 with rope_type='default'"),
        ("llama", {"rope_parameters": {"rope_type": ["linear"]}}, r"rope_type=\['linear'\] is not supported"),
        ("llama", {"rope_parameters": {"rope_theta": "10"}}, r"rope_parameters.rope_theta='10' must be a positive"),
        ("llama", {"rope_parameters": {"rope_theta": True}}, r"rope_theta=True must be a positive"),
        ("llama", {"rope_parameters": {"rope_theta": 0}}, r"rope_theta=0 must be a positive"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor=0.5 with"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, r"beta=1 with rope_type"),
        ("llama", {"sliding_window": 7}, r"sliding_window=7 is no key of Llama"),
        ("llama", {"layer_types": TYPES}, r"layer_types=.* is no key of Llama"),
        ("llama", {"is_causal": False}, r"is_causal=False is not supported"),
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, r"types\[1\]='chunk"),
        ("qwen3", {"layer_types": [None, 3, {}]}, r"layer_types\[0\]=None is not supported"),
        ("qwen3", {"layer_types": TYPES}, r"layer_types\[1\]='sliding_attention', and sliding_window=None, use_slid"),
        ("mistral", {"layer_types": TYPES}, r"layer_types\[1\]='sliding_attention', and sliding_window=None"),
        ("qwen3", {"layer_types": TYPES[:2]}, r"layer_types names 2 layers, num_hidden_layers=3"),
        ("qwen3", {"head_dim": None}, r"head_dim=None must be a number"),
        ("qwen3", {"max_window_layers": None}, r"max_window_layers=None has type NoneType"),
        ("llama", {"num_attention_heads": 0}, r"num_attention_heads=0 must be at least 1"),
        ("llama", {"num_key_value_heads": 0}, r"num_key_value_heads=0 must be at least 1"),
        ("llama", {"num_hidden_layers": 10**12}, r"num_hidden_layers=1000000000000 must be at most"),
        ("llama", {"num_hidden_layers": 4000}, r"num_layers=4000, and there are 30 tensors"),
        ("llama", {"vocab_size": 10**30}, r"vocab_size=10+ must be at most"),
        ("llama", {"head_dim": 10**25}, r"head_dim=10{25} is out of range"),
        ("llama", {"rms_norm_eps": float("nan")}, r"rms_norm_eps=nan must be a finite number"),
        ("llama", {"rms_norm_eps": True}, r"rms_norm_eps=True has type bool"),
        ("mistral-window", {"sliding_window": 0}, r"window=0"),
        ("llama", {"intermediate_size": [88]}, r"intermediate_size=\[88\] has type list"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused(family, keys, message, tmp_path):
    write(tmp_path, family, keys=keys)
    with pytest.raises(ValueError, match=message) as raised:
        load_model(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_a_head_beside_a_tied_embedding(tmp_path):
    """A copy of the embedding is passed over; transformers ties nothing that differs."""
    saved("llama-mha-tied", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, path, metadata={"format": "pt"})
    assert open_checkpoint(tmp_path).config.tie_embeddings
    check_against(tmp_path, 2, 31)
    other = embedding.clone()
    other[100, 3] += 1
    save_file(tensors | {"lm_head.weight": other}, path, metadata={"format": "pt"})
    assert not open_checkpoint(tmp_path).config.tie_embeddings
    assert torch.equal(load_model(tmp_path).head.weight, other)
    check_against(tmp_path, 2, 31)
