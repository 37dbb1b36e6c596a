"""`attnzoo plan`: what it reads, prints and refuses."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attnzoo.checkpoint import save_model
from attnzoo.cli import main
from attnzoo.derived_memory import PassMemory
from attnzoo.kvcache import build_cache
from attnzoo.models import DecoderConfig, DecoderLM
from attnzoo.planner import plan
from attnzoo.planner.chips import CHIPS, chip_of
from attnzoo.planner.fits import GIB, Setup, communicated_bytes, on_a_line, optimizer_bytes, training_memory
from attnzoo.planner.model_file import DEFAULT_VOCABULARY, read_model
from attnzoo.planner.serving import cache_bytes, exact_caches
from attnzoo.settings import parse_words
from tests.helpers.gguf_files import smollm2
from train.config_reader import load_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
RCMHA = str(ROOT / "configs" / "rcmha.yaml")


def config(**changes) -> DecoderConfig:
    return DecoderConfig(**{"vocab_size": 512, "model_dim": 64, "num_layers": 2, "max_positions": 256} | changes)


def request(**changes) -> plan.PlanOptions:
    values = {
        "model": DecoderLM(config()), "gpus": 4, "nodes": 1, "memory": 3 * GIB, "context": 256,
        "precision": "fp32", "optimizer": "adamw", "batch_tokens": None,
    }  # fmt: skip
    return plan.PlanOptions(**values | changes)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_is_read_as_training_reads_it(path):
    trained = load_config(path.name, [])
    if trained.task.get("kind", "language") != "language":
        with pytest.raises(ValueError, match=r"task.kind='[a-z-]+' trains no language model, and only those are"):
            read_model(path)
        return
    assert read_model(path).config == trained.model_config(trained.tokenizer["vocab_size"])


def test_checkpoints_and_their_json_are_read(tmp_path, monkeypatch):
    save_model(tmp_path / "export", DecoderLM(config()))
    run, kept = tmp_path / "run", tmp_path / "home" / "models" / "kept"
    for place in (run / "export", kept):
        shutil.copytree(tmp_path / "export", place)
    monkeypatch.setenv("ATTNZOO_HOME", str(tmp_path / "home"))
    for path in (tmp_path / "export", tmp_path / "export" / "config.json", run, Path("kept")):
        assert read_model(path).config == config()
        assert read_model(path, 77).config == replace(config(), vocab_size=77)
    shutil.rmtree(run / "export")  # a run that has not ended: what it was started with
    shutil.copyfile(RCMHA, run / "config.yaml")
    shutil.copyfile(ROOT / "configs" / "base.yaml", run / "base.yaml")
    assert read_model(run).config == read_model(Path(RCMHA)).config


def test_a_base_is_merged_and_a_missing_vocabulary_said(tmp_path):
    (tmp_path / "base.yaml").write_text("model: {model_dim: 32, num_layers: 2, attention: {kind: mha, num_heads: 4}}")
    child = tmp_path / "child.yaml"
    child.write_text("base: base.yaml\nmodel: {num_layers: 3, attention: {window: 9}}")
    found = read_model(child)
    assert found.config.attention == {"kind": "mha", "num_heads": 4, "window": 9}
    assert (found.config.num_layers, found.config.vocab_size) == (3, DEFAULT_VOCABULARY)
    assert "--vocab-size" in found.vocabulary_source
    child.write_text("base: base.yaml\nmodel: {attention: {kind: linear}}")
    assert read_model(child).config.attention == {"kind": "linear"}


def test_models_of_others_are_read(tmp_path):
    """By config.json alone: a plan comes before the download. The export's own type too."""
    values = {"model_type": "qwen3", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    values |= {"num_attention_heads": 4, "vocab_size": 50, "head_dim": 32}
    (tmp_path / "config.json").write_text(json.dumps(values))
    for path in (tmp_path, tmp_path / "config.json"):
        config = read_model(path).config
        assert config.layer_attention(0)[1]["qk_norm"]
        assert read_model(path, 70).config.vocab_size == 70
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "attnzoo", "decoder": config.to_dict()}))
    assert read_model(tmp_path).config == config
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma"}))
    with pytest.raises(ValueError, match="model_type='gemma' is not supported"):
        read_model(tmp_path)
    assert read_model(smollm2()).config.vocab_size == 49152


def test_without_pyyaml_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    with pytest.raises(ValueError, match="pip install pyyaml"):
        read_model(Path(RCMHA))


def test_it_prints_what_fits(capsys):
    arguments = ["--gpus", "64", "--gpu-memory", "80", "--context", "40000", "--chip", "h100", "--chip", "MI300X"]
    assert main(["plan", "--model", RCMHA, *arguments]) == 0
    printed = capsys.readouterr().out
    assert "2,373,568 parameters" in printed
    assert "64 GPUs in 8 machines" in printed
    assert "sum with reserve" in printed
    assert len(re.findall(r"^\*? +[0-3] +(?:yes|no) +\d+ ", printed, flags=re.MULTILINE)) == 8
    assert "a model, not a measurement" in printed
    assert "NVIDIA H100 data sheet" in printed
    assert "A100" not in printed
    # 4 layers, keys and values of 192 channels in 2 bytes.
    assert str(round(4 * 2 * 192 * 2 * 40000 / 2**20)) in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", "0"], "--context=0 must be at least 1"),
        (["--gpus", "0"], "--gpus=0 must be at least 1"),
        (["--gpus", "2", "--nodes", "3"], "--nodes=3 is more than --gpus=2"),
        (["--gpu-memory", "0"], "--gpu-memory=0.0 must be positive"),
        (["--chip", "H1000"], "unknown chip 'H1000'; did you mean 'H100'?"),
        (["--gpus", "8", "--context", "1024", "--batch-tokens", "1000"], "--batch-tokens=1000 is less than"),
        (["--vocab-size", "0"], "--vocab-size=0 must be at least 1"),
        (["--model", "nowhere.yaml"], "no file 'nowhere.yaml'"),
    ],
)
def test_wrong_usage_ends_with_status_2(arguments, message, capsys):
    first = [] if "--model" in arguments else ["--model", RCMHA]
    assert main(["plan", *first, *([] if "--chip" in arguments else ["--chip", "H100"]), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out


def test_what_fits_nowhere_says_what_would_do(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model": config(model_dim=512, num_layers=16, vocab_size=8192).to_dict()}))
    command = ["plan", "--model", str(path), "--chip", "H100", "--precision", "fp32"]
    arguments = {"--gpus": "2", "--gpu-memory": "2.4", "--context": "16384"}
    assert main([*command, *(word for pair in arguments.items() for word in pair)]) == 1
    message = capsys.readouterr().err
    assert "training does not fit" in message
    ways = dict(re.findall(r"(--[\w-]+) ([\d.]+)", message.split("would fit:")[1]))
    assert {"--gpu-memory", "--context"} <= ways.keys()
    for option, value in ways.items():
        changed = arguments | {option: value}
        assert main([*command, *(word for pair in changed.items() for word in pair)]) == 0, (option, value)


def test_the_micro_batch_is_the_largest_that_fits():
    asked = request()
    for setup in plan.setups(asked)[2:6]:
        option = plan.largest(asked, setup)
        assert option.memory.total <= 3 * GIB
        more = replace(option.setup, micro_batch=option.setup.micro_batch + 1)
        assert training_memory(asked.model, more).total > 3 * GIB


def test_a_plan_asks_for_few_totals():
    """Memory is nearly a straight line in the micro-batch: four questions find where it meets the limit, and bends take
    a few more."""
    asked: list[int] = []

    def total(count: int, bend: int = 10**9) -> int:
        asked.append(count)
        return 1000 + 17 * count + 400 * max(count - bend, 0)

    assert plan.largest_within(1000 + 17 * 345 + 3, total, 4096) == 345
    assert len(asked) == 4
    assert plan.largest_within(1016, total, 4096) == 0
    assert plan.largest_within(10**7, total, 4096) == 4096
    assert 330 <= plan.largest_within(1000 + 17 * 345, total, 4096, 0.05) <= 345
    for bend in (3, 50, 300):
        asked.clear()
        most = plan.largest_within(9000, lambda count, bend=bend: total(count, bend), 4096)
        assert total(most, bend) <= 9000 < total(most + 1, bend)
        assert len(asked) < 30


def test_memory_between_known_micro_batches():
    """Where three lie on a straight line, others are read off it; beyond them, and where there is a bend, not."""
    known = {
        n: PassMemory(kept=5 * n, forward=7 * n + 1, backward=max(9 * n, 20 * n - 110)) for n in (1, 4, 8, 20, 30, 40)
    }
    assert on_a_line(known, 2) == PassMemory(kept=10, forward=15, backward=18)
    assert on_a_line(known, 25) == PassMemory(kept=125, forward=176, backward=390)
    assert on_a_line({n: known[n] for n in (4, 8, 20)}, 15) is None  # the bend is at 10
    assert on_a_line(known, 41) is None
    assert on_a_line({1: known[1], 8: known[8]}, 4) is None


def test_the_choice_prefers_less_communication_then_no_recomputation():
    option = plan.largest(request(), Setup(ranks=4, tokens=256))
    cheap, again = replace(option, communication=5), replace(option, setup=replace(option.setup, checkpointing=True))
    assert plan.choose([replace(option, communication=6), replace(again, communication=5), cheap]) is cheap


def test_zero_cuts_what_it_says():
    model = DecoderLM(config())
    count = model.num_parameters()
    at = [training_memory(model, Setup(stage=s, ranks=4, tokens=8, precision="bf16")) for s in range(4)]
    assert [m.optimizer for m in at] == [8 * count, 2 * count, 2 * count, 2 * count]
    assert [m.master for m in at] == [4 * count, count, count, count]
    assert [m.parameters for m in at] == [2 * count] * 3 + [2 * count // 4 + 2 * count]  # gathered while in use
    matrices = sum(p.numel() for _, p in model.matrix_parameters())
    assert optimizer_bytes(model, "muon") == 8 * count - 4 * matrices
    assert communicated_bytes(model, Setup(stage=1, ranks=4, precision="bf16")) == 2 * (2 * count * 3 // 4)
    assert communicated_bytes(model, Setup(stage=3, ranks=4, precision="bf16"), 2) == 6 * (2 * count * 3 // 4)
    assert communicated_bytes(model, Setup(stage=2)) == 0


def test_exact_caches_of_a_model():
    window = {"kind": "mha", "num_heads": 4, "window": 10}
    by_attention = {
        "full": exact_caches(DecoderLM(config(attention="mha")), 100),
        "window": exact_caches(DecoderLM(config(attention=[window, "linear"])), 100),
        "constant": exact_caches(DecoderLM(config(attention="linear")), 100),
    }
    assert by_attention["full"] == {"full": 2 * (2 * 100 * 64 * 4 + 8)}
    assert list(by_attention["constant"]) == ["constant state"]
    both = by_attention["window"]
    assert both["full"] - both["window"] == 2 * 100 * 64 * 4 - 10 * 2 * 64 * 4


@pytest.mark.parametrize("words", ["d2o keep_ratio=0.3", "think", "streaming keep_ratio=0.5"])
def test_a_compressed_cache_is_planned_with_the_bytes_it_has(words):
    model = DecoderLM(config(attention="mha")).eval()
    name, *options = words.split()
    state = model.init_state(1, 64, cache=build_cache(name, parse_words(options, "")))
    with torch.no_grad():
        _, state = model.extend(torch.arange(64)[None] % model.config.vocab_size, state)
    state = model.compress(state, joinable=True)
    planned = cache_bytes(model, 64, [words])
    assert planned == {"full": exact_caches(model, 64)["full"], words: state.nbytes()}


@pytest.mark.parametrize(
    ("device", "chip"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GB200", "B200"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA GeForce RTX 3090", None),
    ],
)
def test_chip_of_a_device(device, chip):
    assert chip_of(device) == (None if chip is None else CHIPS[chip])


def test_chips_and_roofline():
    assert {"H100", "H100 PCIe", "H200", "A100", "B200", "L40S", "MI300X"} == set(CHIPS)
    asked = request(gpus=2, model=DecoderLM(config()).bfloat16(), precision="bf16")
    option = plan.largest(asked, Setup(stage=1, ranks=2, tokens=256, precision="bf16"))
    text = plan.step_table(asked, option, [CHIPS["A100"]])
    cost = asked.model.cost(option.setup.micro_batch, 256, 256)
    assert f"{3 * cost.flops:.4g} FLOPs" in text
    assert f"{3 * cost.flops / 312e12:.4g}" in text
    assert torch.get_default_dtype() is torch.float32


def test_what_a_plan_leaves_out_is_said(capsys):
    """The largest micro-batch that is looked for, where more may fit; and one is no plural."""
    assert main(["plan", "--model", RCMHA, "--context", "1", "--chip", "H100"]) == 0
    printed = capsys.readouterr().out
    assert "\n1 GPU in 1 machine, " in printed
    assert " tokens a step in 1 pass; " in printed
    assert f"micro-batch {plan.MOST}: the search ends here; a larger one may fit" in printed
    assert main(["plan", "--model", RCMHA, "--gpu-memory", "1", "--chip", "H100"]) == 0
    assert "the search ends here" not in capsys.readouterr().out
