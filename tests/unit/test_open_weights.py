"""Checkpoints of others against transformers: random models of every family, and errors that name what is wrong."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from attnzoo.checkpoint import load_model, open_checkpoint
from attnzoo.models import generate
from attnzoo.ops.common.masks import padding_starts
from tests.helpers.open_weights import CASES, LLAMA3, bound, change, reference, saved, tokens


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_agree(case, tmp_path):
    theirs, ours = saved(case, tmp_path)
    for batch, length in ((1, 1), (3, 7), (2, 67), (1, 301)):
        ids = tokens(batch, length)
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=bound(theirs, ids))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_continuation_agrees(case, tmp_path):
    """Prefill in odd chunks, then token by token, against transformers' forward and its own cache."""
    theirs, ours = saved(case, tmp_path)
    ids = tokens(2, 61)
    expected = theirs(ids).logits
    state = ours.init_state(2, 16)
    parts = []
    for chunk in ids.split([13, 1, 30, *[1] * 17], dim=1):
        out, state = ours.extend(chunk, state)
        parts.append(out)
    close = bound(theirs, ids)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=close)
    first = theirs(ids[:, :40], use_cache=True)
    rest = theirs(ids[:, 40:], cache=first.past_key_values)
    torch.testing.assert_close(torch.cat(parts, 1)[:, 40:], rest.logits, rtol=0, atol=close)


@pytest.mark.parametrize("case", ["llama3-scaling", "mistral-window", "qwen3"])
@torch.no_grad()
def test_padding_agrees(case, tmp_path):
    """A left-padded batch, as transformers takes it, and the same rows right-padded, as the server streams them."""
    theirs, ours = saved(case, tmp_path)
    lengths = torch.tensor([5, 23, 14])
    padded = tokens(3, 23)
    steps = torch.arange(23)
    real = steps >= 23 - lengths[:, None]
    positions = (steps - (23 - lengths[:, None])).clamp(min=0)
    inputs = {"attention_mask": real.long(), "position_ids": positions}
    expected, close = theirs(padded, **inputs).logits, bound(theirs, padded, **inputs)
    ours_left = ours(padded, padding_starts(lengths, 23, "left"))
    torch.testing.assert_close(ours_left[real], expected[real], rtol=0, atol=close)
    right = torch.zeros_like(padded)
    for row, length in enumerate(lengths):
        right[row, :length] = padded[row, 23 - length :]
    out, _ = ours.extend(right, ours.init_state(3, 23), lengths)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(out[row, :length], expected[row, 23 - length :], rtol=0, atol=close)


@torch.no_grad()
def test_greedy_text_agrees(tmp_path):
    theirs, ours = saved("qwen2-windows", tmp_path)
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (3, 17, 29)]
    mine = generate(ours, prompts, max_new_tokens=24)
    for prompt, text in zip(prompts, mine, strict=True):
        out = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert out[0, len(prompt) :].tolist() == text


@torch.no_grad()
def test_shards_and_dtypes(tmp_path):
    reference("llama").to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="60KB")
    theirs = reference("llama")
    for parameter in theirs.parameters():
        parameter.copy_(parameter.bfloat16())
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert load_model(tmp_path).embedding.weight.dtype == torch.bfloat16
    ours = load_model(tmp_path, dtype=torch.float32)
    ids = tokens(2, 11)
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=bound(theirs, ids))


def test_weights_do_not_follow_the_file(tmp_path):
    """What was loaded is a copy: the file may go or change afterwards."""
    _, ours = saved("llama", tmp_path)
    before = ours.head.weight.clone()
    path = tmp_path / "model.safetensors"
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * 1000)
    assert torch.equal(ours.head.weight, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, r"model_type='gemma' is not supported; known: llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu' is not supported"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config=.* is not supported"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0.5 is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, r"rope_type='yarn' is not supported; known"),
        ({"hidden_size": None}, r"config.hidden_size is missing"),
        ({"hidden_size": "48"}, r"config.hidden_size='48' has type str"),
        ({"rope_parameters": {"rope_type": "linear"}}, r"rope_scaling.factor=None has type NoneType"),
        ({"num_key_value_heads": 4}, r"num_heads=6 is not a multiple of num_kv_heads=4"),
        (
            {"tie_word_embeddings": False, "vocab_size": 130},
            r"of another shape: lm_head.weight is \[131, 48\], not \[130",
        ),
        ({"num_hidden_layers": 2}, r"unexpected: model.layers.2.input_layernorm.weight \[48\].* and 5 more"),
        ({"num_hidden_layers": 4}, r"missing: model.layers.3.input_layernorm.weight \[48\]"),
        ({"attention_bias": True}, r"missing: model.layers.0.self_attn.k_proj.bias \[16\]"),
    ],
)
def test_configuration_errors_name_the_key(changes, message, tmp_path):
    saved("llama", tmp_path)
    change(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_nothing_named_in_a_configuration_is_imported(tmp_path):
    """auto_map is how a checkpoint asks transformers to run its code."""
    saved("llama", tmp_path)
    (tmp_path / "modeling_evil.py").write_text("raise SystemExit('executed')")
    change(tmp_path, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"}, architectures=["Evil"])
    assert load_model(tmp_path).config.num_layers == 3


def test_damaged_weights_are_named(tmp_path):
    reference("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=rf"{shard.name} is not a readable safetensors file"):
        load_model(tmp_path)
    tensors = load_file_bytes(whole, tmp_path)
    name = next(iter(tensors))
    save_file({key: value for key, value in tensors.items() if key != name}, shard)
    with pytest.raises(ValueError, match=rf"{shard.name}: model.safetensors.index.json says otherwise about {name}"):
        load_model(tmp_path)
    save_file(tensors | {name: tensors[name].to(torch.int8)}, shard)
    with pytest.raises(ValueError, match=rf"tensor {name} has dtype I8"):
        load_model(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{shard.name} does not exist; is the checkpoint complete"):
        load_model(tmp_path)


def load_file_bytes(data: bytes, directory: Path) -> dict[str, torch.Tensor]:
    path = directory / "whole.safetensors"
    path.write_bytes(data)
    tensors = load_file(path)
    path.unlink()
    return tensors


def test_an_index_stays_in_its_directory(tmp_path):
    saved("llama", tmp_path / "model")
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../other/model.safetensors"}}))
    with pytest.raises(ValueError, match=r"lm_head.weight lies in '../other/model.safetensors'"):
        load_model(tmp_path / "model")
    index.write_text("{}")
    with pytest.raises(ValueError, match=r"has no readable weight_map"):
        load_model(tmp_path / "model")


def test_old_spellings(tmp_path):
    """rope_theta and rope_scaling at the top, frequencies among the tensors, no layer_types."""
    theirs = reference("llama3-scaling")
    theirs.save_pretrained(tmp_path)
    rope = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    change(tmp_path, rope_parameters=None, rope_theta=500.0, rope_scaling=rope)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, path)
    ids = tokens(1, 300)
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path)(ids), theirs(ids).logits, rtol=0, atol=bound(theirs, ids))
    windows = reference("qwen2-windows")
    windows.save_pretrained(tmp_path / "qwen")
    before = open_checkpoint(tmp_path / "qwen").config
    assert [before.layer_attention(layer)[1]["window"] for layer in range(3)] == [None, 7, 7]
    change(tmp_path / "qwen", layer_types=None)
    assert open_checkpoint(tmp_path / "qwen").config == before
