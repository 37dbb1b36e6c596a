"""Models as directories of transformers: the same logits there, the same model back, and refusals that say why."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from attnzoo.checkpoint import export_model, load_model, load_tokenizer
from attnzoo.checkpoint.huggingface_export import family_config
from attnzoo.models import generate
from tests.helpers import serving
from tests.helpers.forked import start_script
from tests.helpers.open_weights import (
    CASES,
    bound,
    check_same_model,
    demo_model,
    reference,
    tokens,
)

FAMILIES = {
    "llama": "llama", "llama-mha-tied": "llama", "llama-mqa-biases": "llama", "llama3-scaling": "llama",
    "llama-linear-scaling": "llama", "mistral-window": "mistral", "mistral": "llama", "qwen2": "qwen2",
    "qwen2-windows": "qwen2", "qwen3": "qwen3", "qwen3-biases": "qwen3",
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_agree(case, tmp_path):
    reference(case).save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    export_model(tmp_path / "ours", ours)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    assert loaded.config.model_type == FAMILIES[case]
    for batch, length in ((1, 1), (3, 7), (2, 67)):
        ids = tokens(batch, length)
        torch.testing.assert_close(loaded(ids).logits, ours(ids), rtol=0, atol=bound(loaded, ids))
    check_same_model(load_model(tmp_path / "ours"), ours)


@pytest.mark.parametrize(
    ("attention", "changes", "family"),
    [
        ({}, {}, "llama"),
        ({"num_heads": 5, "head_dim": 6}, {}, "mistral"),  # Llama's configuration wants heads that divide the width
        ({"window": 7, "num_kv_heads": 2}, {"tie_embeddings": False}, "mistral"),
        ({"qkv_bias": True, "head_dim": 10}, {}, "qwen2"),
        ({"qk_norm": True, "norm_eps": 1e-5}, {}, "qwen3"),
        ({"rope_scaling": {"kind": "linear", "factor": 2.0}}, {}, "llama"),
    ],
)
@torch.no_grad()
def test_our_own_models(attention, changes, family, tmp_path):
    model = demo_model(attention={"kind": "mha", "num_heads": 4} | attention, **changes)
    export_model(tmp_path / "out", model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.model_type == family
    ids = tokens(2, 41)
    torch.testing.assert_close(loaded(ids).logits, model(ids), rtol=0, atol=bound(loaded, ids))
    check_same_model(load_model(tmp_path / "out"), model)


@torch.no_grad()
def test_layers_with_windows_of_their_own(tmp_path):
    layers = [{"kind": "mha", "qkv_bias": True, "window": window} for window in (None, 5)]
    model = demo_model(attention=layers)
    export_model(tmp_path / "out", model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.layer_types == ["full_attention", "sliding_attention"] * 2
    ids = tokens(2, 41)
    torch.testing.assert_close(loaded(ids).logits, model(ids), rtol=0, atol=bound(loaded, ids))
    check_same_model(load_model(tmp_path / "out"), model)


WITHOUT_ATTNZOO = """
import sys
sys.modules["attnzoo"] = None  # importing it fails
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained("out"), AutoModelForCausalLM.from_pretrained("out")
batch = tokenizer(["def read(", "The slots of the state"], return_tensors="pt", padding=True, padding_side="left")
with torch.no_grad():
    logits = model(**batch).logits[:, -1]
new = model.generate(**batch, max_new_tokens=12, do_sample=False)[:, batch["input_ids"].shape[1]:]
save_file({"logits": logits.contiguous(), "new": new.contiguous()}, "result.safetensors")
"""


@pytest.mark.heavy
def test_loads_where_this_project_is_not(tmp_path):
    model, tokenizer = demo_model(), serving.tokenizer()
    export_model(tmp_path / "out", model, tokenizer=tokenizer)
    subprocess.run([sys.executable, "-I", "-c", WITHOUT_ATTNZOO], cwd=tmp_path, check=True, capture_output=True)
    result = load_file(tmp_path / "result.safetensors")
    prompts = [tokenizer.encode(text, bos=True) for text in ("def read(", "The slots of the state")]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = generate(model, prompts, max_new_tokens=12, stop_token=tokenizer.eos_id)
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            logits = model(torch.tensor([prompt]))[0, -1]
        torch.testing.assert_close(result["logits"][row], logits, rtol=0, atol=bound(loaded, torch.tensor([prompt])))
        assert result["new"][row, : len(expected[row])].tolist() == expected[row]


def test_files(tmp_path):
    export_model(tmp_path / "out", demo_model().to(torch.bfloat16), tokenizer=serving.chat_tokenizer())
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        "attnzoo_export.json", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer.model", "tokenizer_config.json",
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 0}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert load_tokenizer(tmp_path / "out").chat_template == serving.CHAT_TEMPLATE
    export_model(tmp_path / "out", demo_model())  # replaced as a whole, tokenizer and all
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the tokenizer has 400 ids and the model vocab_size=399"):
        export_model(tmp_path / "out", demo_model(vocab_size=399), tokenizer=serving.tokenizer())
    assert not list(tmp_path.iterdir())


def mha(**options):
    return {"attention": {"kind": "mha"} | options}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "rcmha"}, r"model.attention: kind='rcmha' in layer 0"),
        ({"attention": ["mha", "linear"]}, r"model.attention: kind='linear' in layer 1"),
        ({"norm": "layernorm"}, r"model.norm='layernorm', where all of them have 'rmsnorm'"),
        ({"mlp": "gelu"}, r"model.mlp='gelu', where all of them have 'swiglu'"),
        (mha(position="none"), r"model.attention: position='none'"),
        (mha(window=5, sinks=1), r"model.attention: sinks=1"),
        ({"attention": [{"kind": "mha", "window": 5}, {"kind": "mha", "window": 6}]}, r"window=5 and window=6"),
        ({"attention": [{"kind": "mha"}, {"kind": "mha", "window": 6}]}, r"window=6 in some layers only"),
        ({"attention": [{"kind": "mha"}, {"kind": "mha", "num_kv_heads": 2}]}, r"num_kv_heads=2 in layer 1 and 4 in"),
        (mha(output_bias=True), r"output_bias=True with qkv_bias=False"),
        (mha(qkv_bias=True, output_bias=True, window=3), r"output_bias=True with window=3"),
        (mha(window=3) | {"mlp_bias": True}, r"model.mlp_bias=True with window=3"),
        (mha(qkv_bias=True) | {"mlp_bias": True}, r"model.mlp_bias=True with qkv_bias=True"),
        (mha(qk_norm=True), r"norm_eps=1e-06 of qk_norm and model.norm_eps=1e-05"),
        (mha(qk_norm=True, norm_eps=1e-5) | {"mlp_bias": True}, r"model.mlp_bias=True with qk_norm=True"),
        (mha(qk_norm=True, norm_eps=1e-5, qkv_bias=True), r"qk_norm=True and qkv_bias=True with output_bias=False"),
        (mha(num_heads=5, head_dim=6) | {"mlp_bias": True}, r"num_heads=5 does not divide model.model_dim=192"),
    ],
)
def test_what_prevents_a_native_form_is_named(changes, message):
    config = replace(demo_model().config, **changes)
    with pytest.raises(ValueError, match=message) as error:
        family_config(config)
    assert "attnzoo export --format attnzoo" in str(error.value)


def test_options_of_one_meaning():
    """Defaults written out, and options that nothing reads, are no differences between layers."""
    plain = {"kind": "mha"}
    full = {"kind": "mha", "num_heads": 4, "num_kv_heads": 4, "head_dim": 48, "norm_eps": 0.5, "rope_theta": 10000.0}
    config = demo_model().config
    assert family_config(replace(config, attention=[plain, full])) == family_config(replace(config, attention="mha"))
    assert family_config(replace(config, init_std=3.0))["initializer_range"] == 1.0


def test_without_transformers(tmp_path):
    """What the command says, and that the native form does not need it."""
    code = """
import sys
sys.modules["transformers"] = None
import attnzoo.export, attnzoo.checkpoint
try:
    import attnzoo.hf
except ImportError as error:
    print(error)
"""
    script, out, errors = (tmp_path / name for name in ("without.py", "out", "errors"))
    script.write_text(code)
    process = start_script([str(script)], os.environ, out, errors)
    process.join(60)
    assert process.exitcode == 0, errors.read_text()
    assert out.read_text() == "attnzoo.hf needs transformers: pip install 'attnzoo[hf]'\n"
