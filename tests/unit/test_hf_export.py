"""Models as directories of transformers: the same logits there, the same model back, and refusals that say why."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import attnzoo.hf
from attnzoo.__main__ import main
from attnzoo.checkpoint import export_model, load_model, load_tokenizer, open_checkpoint, save_model
from attnzoo.checkpoint.huggingface_export import family_config
from attnzoo.models import DecoderConfig, DecoderLM, generate
from attnzoo.tokenizer import SentencePieceTokenizer
from attnzoo.tokenizer.convert import to_huggingface
from attnzoo.tokenizer.sentencepiece import SPACE
from tests.helpers import serving
from tests.helpers.foreign_tokenizers import ANY_TEXT, TEXTS, check_same
from tests.unit.test_open_weights import CASES, bound, reference, tokens
from train.config_reader import load_config
from train.tokenizer import train_tokenizer


def demo_model(**changes) -> DecoderLM:
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


@pytest.fixture(scope="module")
def converted():
    return serving.tokenizer(), to_huggingface(serving.tokenizer())


@settings(max_examples=500, deadline=None)
@given(text=st.one_of(ANY_TEXT, st.text("\u2581 ae<s>\n\U0001f680de", max_size=40)))
@example("literal \u2581 and \u2581\u2581, \u2581x")
@example("<s></s><unk><pad><0x41><0x0A>")
@example("  two  spaces  \n\n\n end ")
@example("\ufeffbom \0 e\u0301 \ufb01 \ue000 \U0010ffff")
def test_a_converted_tokenizer_gives_the_same_ids(converted, text):
    ours, theirs = converted
    assert theirs.encode(text, bos=True, eos=True) == ours.encode(text, bos=True, eos=True)
    assert theirs.decode(theirs.encode(text)) == text


def test_merges_of_few_letters(tmp_path):
    """Many ways into the same piece: where the order of merges would show."""
    draw = random.Random(3)
    for alphabet in ("ab ", "aab c"):
        lines = ["".join(draw.choices(alphabet, k=60)) for _ in range(300)]
        path = train_tokenizer(lines, 330, tmp_path / f"{len(alphabet)}.model")
        ours = SentencePieceTokenizer.load(path)
        theirs = to_huggingface(ours)
        for _ in range(1000):
            text = "".join(draw.choices(alphabet, k=draw.randint(1, 50)))
            assert theirs.encode(text) == ours.encode(text), text


def test_tokenizers_of_an_export(converted, tmp_path):
    ours, direct = converted
    export_model(tmp_path / "out", demo_model(), tokenizer=ours)
    loaded, theirs = load_tokenizer(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    check_same(loaded, direct)
    assert [loaded.spelling(token).replace(" ", SPACE) for token in range(400)] == list(map(ours.spelling, range(400)))
    assert list(map(loaded.token_bytes, range(400))) == list(map(ours.token_bytes, range(400)))
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id, loaded.stop_ids) == (1, 2, 0, ours.stop_ids)
    assert loaded.fingerprint() == direct.fingerprint()
    for text in [*TEXTS, "\u2581", "<s>", "</s><pad>"]:
        ids = ours.encode(text, bos=True)
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids, skip_special_tokens=True) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)
    assert SentencePieceTokenizer.load(tmp_path / "out" / "tokenizer.model").encode("a b") == ours.encode("a b")


def test_tokenizers_without_a_form_are_refused(tmp_path):
    from sentencepiece import SentencePieceTrainer

    options = {
        "vocab_size": 320, "byte_fallback": True, "normalization_rule_name": "identity", "add_dummy_prefix": False,
        "remove_extra_whitespaces": False, "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "minloglevel": 2,
    }  # fmt: skip
    for changes, message in (
        ({"model_type": "unigram"}, "the tokenizer is not BPE"),
        (
            {"model_type": "bpe", "user_defined_symbols": ["\n", "<|x|>"]},
            r"user-defined piece '<\|x\|>' of more than one",
        ),
    ):
        path = str(tmp_path / "model")
        lines = iter(serving.TEXT.splitlines() * 20)
        SentencePieceTrainer.train(sentence_iterator=lines, model_prefix=path, **options, **changes)
        with pytest.raises(ValueError, match=message):
            to_huggingface(SentencePieceTokenizer.load(tmp_path / "model.model"))


def run(capsys, *arguments):
    status = main(["export", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_command(tmp_path, capsys):
    native, own = tmp_path / "mha", tmp_path / "rcmha"
    save_model(native, demo_model(), tokenizer=serving.tokenizer())
    save_model(own, serving.small_model("rcmha"))
    status, out, _ = run(capsys, native, tmp_path / "a")
    assert status == 0
    assert f"llama, {demo_model().num_parameters():,} parameters, torch.float32" in out
    check_same_model(load_model(tmp_path / "a"), load_model(native))
    status, out, _ = run(capsys, own, tmp_path / "b")
    assert status == 0
    for text in ("attnzoo,", "kind='rcmha' in layer 0", "without a tokenizer", "import attnzoo.hf, then"):
        assert text in out
    assert open_checkpoint(tmp_path / "b").config == load_model(own).config
    status, out, _ = run(capsys, native, tmp_path / "a", "--format", "attnzoo")  # replaces the model that is there
    assert status == 0
    assert json.loads((tmp_path / "a" / "config.json").read_text())["model_type"] == "attnzoo"
    # An export is a checkpoint like any other.
    assert run(capsys, tmp_path / "a", tmp_path / "c", "--format", "native")[0] == 0
    check_same_model(load_model(tmp_path / "c"), load_model(native))
    check_same(load_tokenizer(tmp_path / "c"), to_huggingface(serving.tokenizer()))


def test_command_refuses(tmp_path, capsys):
    own = save_model(tmp_path / "rcmha", serving.small_model("rcmha"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    for arguments, message in (
        ((own, tmp_path / "b", "--format", "native"), "kind='rcmha' in layer 0"),
        ((tmp_path / "none", tmp_path / "b"), "config.json does not exist"),
        ((own, own), "holds the checkpoint itself"),
        ((own, tmp_path), "holds the checkpoint itself"),
        ((own, tmp_path / "other"), "holds 'letter.txt', and no earlier export; give a new directory"),
    ):
        status, out, err = run(capsys, *arguments)
        assert (status, out) == (2, "")
        assert message in err
    assert (tmp_path / "other" / "letter.txt").read_text() == "dear"
    with pytest.raises(SystemExit) as stop:
        main(["export", "--help"])
    assert stop.value.code == 0
    assert "attnzoo export runs/mha/export out" in capsys.readouterr().out


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def foreign(directory: Path, what: str) -> None:
    """What someone may keep where an export is asked for."""
    if what in ("sources", "any configuration"):
        directory.mkdir()
        (directory / "config.json").write_text("{}")
    if what == "sources":
        (directory / ".git").mkdir()
        (directory / ".git" / "HEAD").write_text("ref: refs/heads/main")
        (directory / "train.py").write_text("print('years of work')")
    elif what == "trained here":
        save_model(directory, demo_model())
    elif what == "of others":
        reference("llama").save_pretrained(directory)
    elif what == "a marker of someone else":
        directory.mkdir()
        (directory / "attnzoo_export.json").write_text('{"files": {}}')
    elif what == "damaged marker":
        export_model(directory, demo_model())
        (directory / "attnzoo_export.json").write_text("{" * 100_000)
    elif what == "a file":
        directory.write_text("text")
    elif what == "notes beside an export":
        export_model(directory, demo_model())
        (directory / "README.md").write_text("what I found")
    elif what == "a directory beside an export":
        export_model(directory, demo_model())
        (directory / ".git").mkdir()
    elif what == "an export trained further":
        export_model(directory, demo_model())
        path = directory / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    elif what == "a link in place of a file":
        export_model(directory, demo_model())
        (directory / "config.json").rename(directory.parent / "elsewhere.json")
        (directory / "config.json").symlink_to(directory.parent / "elsewhere.json")


FOREIGN = [
    "sources", "any configuration", "trained here", "of others", "a marker of someone else", "damaged marker",
    "a file", "notes beside an export", "a directory beside an export", "an export trained further",
    "a link in place of a file",
]  # fmt: skip


@pytest.mark.parametrize("form", ["native", "attnzoo"])
@pytest.mark.parametrize("what", FOREIGN)
def test_nothing_but_an_earlier_export_is_replaced(what, form, tmp_path, capsys):
    source = save_model(tmp_path / "source", demo_model())
    foreign(tmp_path / "out", what)
    before = contents(tmp_path)
    capsys.readouterr()  # transformers' progress
    status, out, err = run(capsys, source, tmp_path / "out", "--format", form)
    assert (status, out) == (2, "")
    assert err.startswith(f"attnzoo export: error: OUT: '{tmp_path / 'out'}")
    assert "give a" in err
    for write in (export_model, attnzoo.hf.export_model):
        with pytest.raises(ValueError, match=r"give a( new)? directory"):
            write(tmp_path / "out", demo_model())
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "what", [what for what in FOREIGN if what not in ("trained here", "a link in place of a file")]
)
def test_nothing_but_an_earlier_model_is_replaced(what, tmp_path):
    """`save_model`, which training calls for its export/."""
    foreign(tmp_path / "out", what)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"give a( new)? directory"):
        save_model(tmp_path / "out", demo_model())
    assert contents(tmp_path) == before


def test_links_lead_to_the_directory_that_is_replaced(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for _ in range(2):
        export_model(tmp_path / "link", demo_model())
    assert (tmp_path / "link").is_symlink()
    check_same_model(load_model(tmp_path / "real"), demo_model())


def test_without_transformers():
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
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert result.stdout == "attnzoo.hf needs transformers: pip install 'attnzoo[hf]'\n"
