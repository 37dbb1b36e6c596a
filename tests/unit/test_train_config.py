"""Every mistake in a configuration is told with its place and the way out."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from train.config_layers import CONFIGS, ConfigError
from train.config_reader import load_config
from train.tasks import LanguageTask, build_task


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
    if isinstance(build_task(config), LanguageTask):
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
def test_every_form_of_attention_replaces_every_other(tmp_path: Path, override: str, attention: object) -> None:
    assert load_config("rcmha.yaml", [override]).model["attention"] == attention
    listed = write(tmp_path / "a.yaml", f"base: {CONFIGS}/rcmha.yaml\nmodel: {{attention: [rmha, mdha]}}\n")
    assert load_config(listed, [override]).model["attention"] == attention


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
    ("train:\n\n  steps: many\n", 3, "train.steps='many' has type str; it must be int"),
    ("train: {steps: 1}\noptim:\n  lr: fast\n", 3, "optim.lr='fast' has type str; it must be float"),
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
        ("train.steps=x", "command line: train.steps='x' has type str; it must be int"),
        ("train={steps: 1.5}", "command line: train.steps=1.5 has type float; it must be int"),
        ("log.progress=maybe", "command line: log.progress='maybe' has type str; it must be bool"),
        (
            "model.num_heads=8",
            "command line: unknown key model.num_heads; did you mean model.attention.num_heads? known",
        ),
        ("attention=mha", "command line: unknown key attention; did you mean model.attention? known: cache_dir, "),
        ("lr=0.1", "command line: unknown key lr; did you mean optim.lr? known: cache_dir, "),
        ("train.bach_size=4", "command line: unknown key train.bach_size; did you mean 'batch_size'?"),
        ("every=4", "did you mean checkpoint.every, eval.every, log.every or sample.every? known: cache_dir, "),
        ("attentoin=mha", "command line: unknown key attentoin; did you mean model.attention? known: cache_dir, "),
        ("model.attention.num_head=1", "command line: unknown key model.attention.num_head"),
        ("sample.top_p=0", "command line: sample.top_p=0.0 must be positive"),
        ("train.steps", "command line: 'train.steps' is not of the form key=value"),
        (("train.steps=1", "seed=2", "train.steps=3"), "command line: train.steps is given twice; keep one of them"),
        ("model.attention=rmah", "command line: unknown attention 'rmah'; did you mean 'rmha'?"),
    ],
)
def test_mistakes_on_the_command_line(override: str | tuple[str, ...], expected: str) -> None:
    words = (override,) if isinstance(override, str) else override
    found = message("rcmha.yaml", *words)
    assert found.startswith("command line: ")
    assert expected in found


def test_an_option_of_the_variant_has_its_place(tmp_path: Path) -> None:
    words = ("model.attention=mha", "model.num_heads=8")
    assert "did you mean model.attention={kind: mha, num_heads: 8}? known" in message("rcmha.yaml", *words)
    path = write(
        tmp_path / "a.yaml", "base: rcmha.yaml\nmodel:\n  num_heads: 8\n".replace("rcmha", str(CONFIGS / "rcmha"))
    )
    assert "a.yaml:3: unknown key model.num_heads; did you mean model.attention.num_heads?" in message(path)


def test_cycles_and_missing_files(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "base: b.yaml\n")
    path = write(tmp_path / "b.yaml", "base: a.yaml\n")
    assert "form a cycle: b.yaml -> a.yaml -> b.yaml" in message(path)
    assert "c.yaml:1: base: none.yaml does not exist" in message(write(tmp_path / "c.yaml", "base: none.yaml\n"))
    elsewhere = message(write(tmp_path / "e.yaml", "name: e\nbase: rcmha.yaml\n"))
    assert f"e.yaml:2: base: rcmha.yaml does not exist beside e.yaml; write base: {CONFIGS}/rcmha.yaml" in elsewhere
    assert load_config(write(tmp_path / "e.yaml", f"base: {CONFIGS}/rcmha.yaml\n")).name == "rcmha"
    assert "did you mean 'rcmha.yaml'?" in message("rcmah.yaml")
    assert "d.yaml: cannot be read as YAML" in message(write(tmp_path / "d.yaml", "a: [1\n"))


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "1.0e-6", "0.000001", "+1e-06", "1.e-6"])
@pytest.mark.parametrize("key", ["optim.eps", "model.norm_eps", "data.validation_fraction", "model.init_std"])
def test_scientific_notation_is_a_number_everywhere(tmp_path: Path, text: str, key: str) -> None:
    section, name = key.split(".")
    base = f"base: {CONFIGS}/base.yaml\n"
    for config in (
        load_config("base.yaml", [f"{key}={text}"]),
        load_config("base.yaml", [f"{section}={{{name}: {text}}}"]),
        load_config(write(tmp_path / "a.yaml", f"{base}{section}:\n  {name}: {text}\n")),
    ):
        found = getattr(config, section)
        assert (found[name] if isinstance(found, dict) else getattr(found, name)) == 1e-6


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr=.inf", "optim.lr: .inf is not a finite number"),
        ("optim.weight_decay=.nan", "optim.weight_decay: .nan is not a finite number"),
        ("optim.lr=inf", "optim.lr=inf is not a finite number"),
        ("optim.lr=nan", "optim.lr=nan is not a finite number"),
        ("optim.lr=1e999", "optim.lr: 1e999 is not a finite number"),
        ("optim={lr: -.INF}", "optim: lr=-.INF is not a finite number"),
        ("model.norm_eps=.nan", "model.norm_eps: .nan is not a finite number"),
        ("model.norm_eps=nan", "model.norm_eps='nan' has type str"),
        ("data.validation_fraction=.nan", "data.validation_fraction: .nan is not a finite number"),
        ("model.attention={kind: mha, num_heads: .nan}", "num_heads=.nan is not a finite number"),
        ("train.max_minutes=.inf", "is not a finite number"),
        ("optim={lr: 1, lr: 2}", "optim: lr is set twice"),
        ("seed=-1", "seed=-1 must be between 0 and 4294967295"),
        ("seed=4294967296", "seed=4294967296 must be between 0 and"),
        ("seed=99999999999999999999999999", "must be between 0 and"),
        ("data.seed=-1", "data.seed=-1 must be between 0 and 4294967295"),
        ("train.batch_size=99999999999999999999999", "train.batch_size=99999999999999999999999 must be at most"),
        ("model.vocab_size=300", "model.vocab_size=300: the vocabulary is the tokenizer's; set tokenizer.vocab_size"),
        ("train.stop_at_step=401", "train.stop_at_step=401 lies beyond the end, train.steps=400"),
        ("name=../../x", "name='../../x' must be the name of a directory"),
        ("name=..", "name='..' must be"),
        ("name=a/b", "name='a/b' must be"),
        ("name=''", "name='' must be"),
        ("name=/tmp/x", "name='/tmp/x' must be"),
        ("name='a '", "name='a ' must be"),
        ('name="a\\nb"', "must be the name of a directory"),
        ("run_dir=''", "run_dir is empty"),
        ("cache_dir=''", "cache_dir is empty"),
        ("run_dir=~no_such_user/x", "run_dir='~no_such_user/x': there is no user '~no_such_user'"),
        ("cache_dir=~no_such_user", "cache_dir='~no_such_user': there is no user"),
        ("optim.beta1=1", "optim.beta1=1.0 must lie in [0, 1)"),
        ("optim.beta2=1.0", "optim.beta2=1.0 must lie in [0, 1)"),
        ("optim.momentum=1", "optim.momentum=1.0 must lie in [0, 1)"),
        ("lora.dropout=1", "lora.dropout=1.0 must lie in [0, 1)"),
        ("name=${nothing}", "name: Interpolation key 'nothing' not found"),
        ("name=???", "name=??? is OmegaConf's sign for a missing value"),
        ("model.norm=???", "model.norm=??? is OmegaConf"),
        ("sample.prompts=[a, '???']", "sample.prompts=??? is OmegaConf"),
        ("model.attention={kind: mha, num_heads: '???'}", "model.attention.num_heads=??? is OmegaConf"),
        ("model..norm=rmsnorm", "'model..norm=rmsnorm' is not of the form key=value"),
        (".=1", "is not of the form key=value"),
        ("train.steps=!!int x", "train.steps: cannot be read as YAML"),
        ("model=&a [*a]", "model: the value contains itself"),
        ("train.steps=[[[[", "train.steps: cannot be read as YAML"),
    ],
)
def test_values_that_no_run_could_use(override: str, expected: str) -> None:
    found = message("base.yaml", override)
    assert found.startswith("command line: ")
    assert expected in found


def test_a_step_to_stop_at_may_be_the_last() -> None:
    assert load_config("base.yaml", ["train.stop_at_step=400"]).train.stop_at_step == 400


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("train:\n  steps: 1\n  steps: 2\n", 3, "train.steps is set twice, first in line 2; keep one of them"),
        ("train: {steps: 1}\nseed: 1\ntrain: {steps: 2}\n", 3, "train is set twice, first in line 1"),
        ("train: {steps: 1}\nmodel:\n  attention:\n    kind: mha\n    kind: rmha\n", 5, "model.attention.kind is"),
        ("train: {steps: 1}\noptim:\n  lr: .inf\n", 3, "optim.lr=.inf is not a finite number"),
        ("train: {steps: 1}\nname: ../x\n", 2, "name='../x' must be the name of a directory"),
        ("train: {steps: 2}\nmodel:\n  vocab_size: 3\n", 3, "model.vocab_size=3"),
    ],
)
def test_mistakes_in_files_have_their_line(tmp_path: Path, text: str, line: int, expected: str) -> None:
    found = message(write(tmp_path / "bad.yaml", text))
    assert f"bad.yaml:{line}: " in found
    assert expected in found


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n", "null\n", "\ufeff"])
def test_empty_files_are_named(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "empty.yaml", text)
    assert "empty.yaml is empty; write keys and values" in message(path)
    assert "empty.yaml is empty" in message(write(tmp_path / "b.yaml", "base: empty.yaml\ntrain: {steps: 1}\n"))


def test_words_stay_words(tmp_path: Path) -> None:
    """YAML 1.1 takes `no` for false, 010 for eight and 1:30 for ninety."""
    base = f"base: {CONFIGS}/base.yaml\n"
    path = write(
        tmp_path / "a.yaml", f"{base}name: no\ntrain: {{steps: 010}}\ndata: {{source: on, text_field: 2026-01-01}}\n"
    )
    config = load_config(path)
    assert (config.name, config.train.steps) == ("no", 10)
    assert (config.data["source"], config.data["text_field"]) == ("on", "2026-01-01")
    shared = "x: &x {model_dim: 8}\n"
    assert "unknown key x" in message(write(tmp_path / "b.yaml", f"{shared}train: {{steps: 1}}\n"))
    merged = "train: {steps: 1}\nmodel: &m {model_dim: 8, num_layers: 1}\n"
    assert load_config(write(tmp_path / "c.yaml", merged)).model == {"model_dim": 8, "num_layers": 1}
