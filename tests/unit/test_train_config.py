"""Every mistake in a configuration is told with its place and the way out."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from train.config import CONFIGS, ConfigError, load_config


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def message(path: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_file_loads(path: Path) -> None:
    config = load_config(path.name)
    assert config.model_config(2048).num_layers >= 1


def test_base_names_every_key() -> None:
    base = OmegaConf.to_container(OmegaConf.load(CONFIGS / "base.yaml"))
    resolved = OmegaConf.to_container(OmegaConf.create(load_config("base.yaml").to_yaml()))
    assert base == resolved


def test_inheritance_and_overrides(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "train: {steps: 7, batch_size: 4}\nmodel: {model_dim: 8, num_layers: 1}\n")
    path = write(tmp_path / "b.yaml", "base: a.yaml\ntrain: {batch_size: 2}\n")
    config = load_config(path, ["optim.lr=0.5", "model.num_layers=3", "train.threads=null"])
    assert (config.train.steps, config.train.batch_size, config.optim.lr) == (7, 2, 0.5)
    assert config.model == {"model_dim": 8, "num_layers": 3}


def test_a_new_variant_drops_the_old_ones_options(tmp_path: Path) -> None:
    model = "model: {model_dim: 8, num_layers: 1, attention: {kind: rcmha, num_heads: 2, conv_width: 5}}\n"
    write(tmp_path / "a.yaml", "train: {steps: 1}\n" + model)
    path = write(tmp_path / "b.yaml", "base: a.yaml\nmodel: {attention: {kind: mha, num_heads: 4}}\n")
    assert load_config(path).model["attention"] == {"kind": "mha", "num_heads": 4}
    kept = load_config(str(tmp_path / "a.yaml"), ["model.attention.num_heads=4"]).model["attention"]
    assert kept == {"kind": "rcmha", "num_heads": 4, "conv_width": 5}


@pytest.mark.parametrize(
    ("override", "attention"),
    [
        ("model.attention=[rcmha,linear]", ["rcmha", "linear"]),
        ("model.attention=linear", "linear"),
        ("model.attention={kind: mha}", {"kind": "mha"}),
        ("model.attention=[{kind: mha, num_heads: 8}, rcmha]", [{"kind": "mha", "num_heads": 8}, "rcmha"]),
    ],
)
def test_every_form_of_attention_replaces_every_other(override: str, attention: object) -> None:
    assert load_config("rcmha.yaml", [override]).model["attention"] == attention
    listed = ["model.attention=[rmha,mdha]", override]
    assert load_config("rcmha.yaml", listed).model["attention"] == attention


def test_options_of_a_list_cannot_be_set_one_by_one() -> None:
    text = message("rcmha.yaml", "model.attention=[rcmha,linear]", "model.attention.num_heads=8")
    assert "model.attention is ['rcmha', 'linear'], so its options cannot be set one by one" in text
    assert "command line" in text


def test_resolved_yaml_reads_back(tmp_path: Path) -> None:
    config = load_config("rcmha.yaml", ["train.steps=3"])
    assert load_config(write(tmp_path / "config.yaml", config.to_yaml())) == config


BAD = [
    ("train:\n  steps: 1\n  stepz: 2\n", 3, "unknown key train.stepz; did you mean 'steps'?"),
    ("train:\n  steps: 1\ntrian: {}\n", 3, "unknown key trian; did you mean 'train'?"),
    ("train:\n\n  steps: many\n", 3, "train.steps: Value 'many'"),
    ("train: {steps: 1}\noptim:\n  lr: fast\n", 3, "optim.lr: Value 'fast'"),
    ("train: {steps: 1}\noptim: 3\n", 2, "optim=3 must be a section"),
    ("train:\n  steps: 0\n", 2, "train.steps=0 must be at least 1"),
    ("train: {steps: 1}\nprecision: fp8\n", 2, "unknown precision 'fp8'"),
    ("train: {steps: 1}\nmodel:\n  model_dim: 8\n  num_layer: 1\n", 4, "unknown key model.num_layer"),
    (
        "train: {steps: 1}\nmodel:\n  model_dim: 8\n  num_layers: 1\n  attention:\n    kind: rcmha\n    num_headz: 1\n",
        7,
        "num_headz",
    ),
    (
        "train: {steps: 1}\nmodel: {model_dim: 8, num_layers: 1}\ndata:\n  sourze: x\n",
        4,
        "unknown key data.sourze; did you mean 'source'?",
    ),
    ("train: {batch_size: 4}\n", 1, "train.steps and train.max_minutes are both unset"),
    ("train:\n  max_minutes: 1\nschedule: {warmup_steps: 3}\n", 3, "schedule.warmup_steps=3"),
    ("train: {steps: 1, compile: true}\nzero: {stage: 3}\n", 1, "train.compile does not work with zero.stage=3"),
    (
        "train: {steps: 1}\noptim: {name: muon}\nzero: {stage: 1, offload_optimizer: true}\n",
        3,
        "set zero.offload_optimizer=false or optim.name=adamw",
    ),
]


@pytest.mark.parametrize(("text", "line", "expected"), BAD)
def test_mistakes_name_key_and_line(tmp_path: Path, text: str, line: int, expected: str) -> None:
    found = message(write(tmp_path / "bad.yaml", text))
    assert f"bad.yaml:{line}: " in found
    assert expected in found


def test_a_mistake_in_a_base_names_the_base(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "train: {steps: 1}\n\nseeed: 1\n")
    assert "a.yaml:3: unknown key seeed" in message(write(tmp_path / "b.yaml", "base: a.yaml\n"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stepz=1", "command line: unknown key train.stepz; did you mean 'steps'?"),
        ("train.steps=x", "command line: train.steps: Value 'x'"),
        ("model.attention.num_head=1", "command line: unknown key model.attention.num_head"),
        ("sample.top_p=0", "command line: sample.top_p=0.0 must be positive"),
        ("train.steps", "command line: 'train.steps' is not of the form key=value"),
        ("model.attention=rmah", "command line: unknown attention 'rmah'; did you mean 'rmha'?"),
    ],
)
def test_mistakes_on_the_command_line(override: str, expected: str) -> None:
    assert message("rcmha.yaml", override).startswith(expected)


def test_cycles_and_missing_files(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "base: b.yaml\n")
    path = write(tmp_path / "b.yaml", "base: a.yaml\n")
    assert "form a cycle: b.yaml -> a.yaml -> b.yaml" in message(path)
    assert "c.yaml:1: base: none.yaml does not exist" in message(write(tmp_path / "c.yaml", "base: none.yaml\n"))
    assert "did you mean 'rcmha.yaml'?" in message("rcmah.yaml")
    assert "d.yaml: cannot be read as YAML" in message(write(tmp_path / "d.yaml", "a: [1\n"))
