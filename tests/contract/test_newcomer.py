"""What CONTRIBUTING promises a newcomer: copy the template, and the contract finds it, in the tree or outside."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import attnzoo.attention
from attnzoo.attention import ATTENTION, load_plugins
from attnzoo.checkpoint import load_model, open_checkpoint, save_model
from attnzoo.cli import main
from attnzoo.models import DecoderConfig, DecoderLM
from tests.contract.contract import ITEMS
from tests.helpers.forked import start_script

ROOT = Path(__file__).resolve().parents[2]
NEWCOMERS = Path(__file__).parent / "newcomers"
TEMPLATE = Path(attnzoo.attention.__file__).parent / "_template.py"
MODULE_RUN = str(ROOT / "tests" / "helpers" / "module_run.py")


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path) -> Run:
    """`python -m` in the root of the repository, in a fork that has imported torch."""

    def start(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        out, errors = tmp_path / "out", tmp_path / "errors"
        process = start_script([MODULE_RUN, *words], os.environ | environment, out, errors, cwd=ROOT)
        process.join(300)
        return subprocess.CompletedProcess(words, process.exitcode, out.read_text(), errors.read_text())

    return start


def contract(names: str, *options: str) -> list[str]:
    """pytest's options for the contract of some variants."""
    return ["tests/contract/test_contract.py", "-q", "-p", "no:cacheprovider", "-k", names, *options]


@pytest.fixture
def contract_run(run) -> Run:
    return lambda names, *options, **environment: run("pytest", *contract(names, *options), **environment)


def passed(result: subprocess.CompletedProcess[str], items: int) -> None:
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{items} passed" in result.stdout


@pytest.mark.heavy
def test_copy_of_the_template_in_the_tree(tmp_path):
    """The contract finds it. (Whether it keeps all of it: `test_newcomers`, where it is a plug-in.)"""
    tree = tmp_path / "tree"
    for folder in ("attnzoo", "train", "serve", "tests"):
        shutil.copytree(ROOT / folder, tree / folder)  # bytecode, too: it holds for files of the same time
    shutil.copyfile(ROOT / "pyproject.toml", tree / "pyproject.toml")
    shutil.copyfile(TEMPLATE, tree / "attnzoo" / "attention" / "mine.py")
    words = [sys.executable, "-m", "pytest", *contract("mine and (defaults or by_hand)")]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    passed(subprocess.run(words, cwd=tree, env=environment, capture_output=True, text=True, check=False), items=2)


@pytest.mark.heavy
def test_newcomers(contract_run, run, tmp_path):
    """The template; a bias without a largest distance; buffers, numbers and frozen parameters; a variant without any
    part; a bias that is a function; plain modules."""
    names = ["mine", "kerple", "buffered", "running_mean", "biased", "plain", "reads"]
    template = shutil.copyfile(TEMPLATE, tmp_path / "my_variant.py")
    others = (NEWCOMERS / f"{name}.py" for name in names[2:])
    plugins = os.pathsep.join(map(str, (template, ROOT / "examples" / "your_own_variant.py", *others)))
    passed(contract_run(" or ".join(names), ATTNZOO_PLUGINS=plugins), items=12 * (len(ITEMS) - 1) + len(names))
    listed = run(*LIST, ATTNZOO_PLUGINS=str(template))
    assert "\nmine " in listed.stdout


MISTAKES = {
    "bias": ("return -self.slope[:, None] * distance_P", "return -self.slope[:, None] * distance_P / 2", "by_hand"),
    "formula": ("/ q.shape[2] ** 0.5", "", "by_hand"),
    "nothing": ('source = "Press', 'implementations = ("torch",)\n    source = "Press', None),
    "start": ("2.0 ** (-8.0", "float('nan') * (-8.0", "defaults saved served"),
    "count": (
        "super().__init__(heads)\n",
        "super().__init__(heads)\n        assert heads.num_heads != 7\n",
        "defaults",
    ),
    "noise": (
        "super().__init__(heads)\n",
        "super().__init__(heads)\n        self.register_buffer('noise', torch.rand(3), persistent=False)\n",
        "all",
    ),
    "meta": (
        "super().__init__(heads)\n",
        "super().__init__(heads)\n        self.first = float(torch.ones(2)[0])\n",
        "saved served",
    ),
    "plain": (
        "super().__init__(heads)\n",
        "super().__init__(heads)\n        self.ones = torch.ones(3)\n",
        "all",
    ),
    "complex": (
        "super().__init__(heads)\n",
        "super().__init__(heads)\n        self.register_buffer('turns', torch.ones(3, dtype=torch.complex64))\n",
        "saved served",
    ),
}
"""What is written instead of what, and which items notice; None: it is no mistake; all: it cannot be built."""


@pytest.mark.heavy
def test_mistakes_in_the_template_are_caught(contract_run, tmp_path):
    """Each by the item that is for it; in code that all forms share, `reference` cannot see a mistake."""
    text, plugins = TEMPLATE.read_text(encoding="utf-8"), []
    for name, (right, wrong, _) in MISTAKES.items():
        assert right in text
        plugins.append(tmp_path / f"{name}.py")
        changed = text.replace(right, wrong).replace('register("mine")', f'register("mine_{name}")')
        plugins[-1].write_text(changed.replace('{"num_kv_heads": 1}', ""), encoding="utf-8")
    result = contract_run("mine", ATTNZOO_PLUGINS=os.pathsep.join(map(str, plugins)))
    found = {name: re.findall(rf"FAILED .*\[mine_{name}-(\w+)\]", result.stdout) for name in MISTAKES}
    for name in ("plain", "noise"):
        assert len(found[name]) > 9, result.stdout
        found[name] = ["all"]
    assert found == {name: (items or "").split() for name, (_, _, items) in MISTAKES.items()}, result.stdout
    assert "a variant reads values of tensors in __init__" in result.stdout
    assert "has dtype torch.complex64, which cannot be saved" in result.stdout
    assert "keeps the buffer mixing.position.noise with persistent=False" in result.stdout
    assert "keeps mixing.position.ones, a tensor that is neither a parameter nor a buffer" in result.stdout


@pytest.mark.heavy
def test_broken_plugin_is_caught(contract_run, tmp_path):
    """A plugin whose streaming form forgets its distance fails the contract."""
    text = TEMPLATE.read_text(encoding="utf-8")
    right = "    def reset_parameters(self"
    assert right in text
    broken = text.replace(
        right,
        "    def attend(self, qkv, mask, impl):\n        return super().attend(qkv, shifted(mask), impl)\n\n" + right,
    )
    broken += (
        "\n\ndef shifted(mask):\n"
        "    if mask.parallel:\n"
        "        return mask\n"
        "    return dataclasses.replace(mask, query_positions_BT=mask.query_positions_BT + 1)\n"
    )
    broken = broken.replace("from dataclasses", "import dataclasses\nfrom dataclasses")
    plugin = tmp_path / "broken.py"
    plugin.write_text(broken, encoding="utf-8")
    result = contract_run("mine", "-x", ATTNZOO_PLUGINS=str(plugin))
    assert result.returncode == 1, result.stdout
    assert "extend over" in result.stdout


LIST = ("attnzoo", "list")


MINE = """\
from attnzoo.attention.base import ATTENTION
from attnzoo.attention.mha import MHA
@ATTENTION.register("a")
class A(MHA):
    source = "s"
"""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = (\n", "SyntaxError: '(' was never closed (line 1)"),
        ("\nimport no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module' (line 2)"),
        ("def f():\n    return 1 / 0\nf()\n", "ZeroDivisionError: division by zero (line 2)"),
        ("x = 1\n", "registers no variant; put @ATTENTION.register"),
        (
            "from attnzoo.attention.base import ATTENTION\n@ATTENTION.register('mha')\nclass A: ...\n",
            "attention 'mha': A is no subclass of Attention",
        ),
        (
            "from attnzoo.attention.mha import MHA\nfrom attnzoo.attention.base import ATTENTION\n"
            "@ATTENTION.register('mha')\nclass A(MHA): ...\n",
            "attention name 'mha' is taken by MHA in ",
        ),
        (
            "from attnzoo.attention.base import ATTENTION, Attention\n@ATTENTION.register('a')\n"
            "class A(Attention):\n    def forward(self, x): ...\n",
            "attention 'a': A lacks cost, reference, traits",
        ),
        (
            "from attnzoo.attention.mha import MHA\nfrom attnzoo.attention.base import ATTENTION\n"
            "@ATTENTION.register\nclass A(MHA): ...\n",
            'give a word without spaces, as it stands in configurations: @register("name")',
        ),
        (
            "from attnzoo.attention.composed import ComposedAttention as C\n"
            "from attnzoo.attention.base import ATTENTION\n@ATTENTION.register('a')\nclass A(C): ...\n",
            "attention 'a': A lacks `source`",
        ),
        ("raise SystemExit\n", "SystemExit:  (line 1)"),
        ("import sys\nsys.exit('no GPU here')\n", "SystemExit: no GPU here (line 2)"),
        (MINE + "    cases = {'window': 3}\n", "cases={'window': 3} must be a list of options to test"),
        (
            MINE + "    def __init__(self, config, *, depth): ...\n",
            "A.__init__ must take its configuration and nothing else",
        ),
        (MINE + "    def __init__(self): ...\n", "A.__init__ must take its configuration and nothing else"),
        (
            "from attnzoo.attention.composed import ComposedAttention as C\n"
            "from attnzoo.attention.base import ATTENTION\n@ATTENTION.register('a')\n"
            "class A(C):\n    source, Config = 's', dict\n",
            "attention 'a': A lacks `Config`",
        ),
    ],
)
def test_a_plugin_that_cannot_be_imported(content, message, tmp_path, monkeypatch, capsys):
    """One line that names the variable, the file, and the place in it."""
    plugin = tmp_path / "plugin.py"
    plugin.write_text(content, encoding="utf-8")
    known = ATTENTION.names()
    with pytest.raises(ValueError, match=f"^{re.escape('ATTNZOO_PLUGINS=')}.*{re.escape(str(plugin))}") as error:
        load_plugins(str(plugin))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert ATTENTION.names() == known


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ("no_such_file.py", "'no_such_file.py' is not a Python file: nothing is there (read from "),
        ("a.py,b.py", "is ',' meant to separate two paths?"),
        ("a.py;b.py", "is ';' meant to separate two paths?"),
        (str(ROOT), "is a directory"),
        (str(ROOT / "README.md"), "is not a Python file"),
    ],
)
def test_paths_that_are_no_plugin(paths, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_plugins(paths)
    assert str(error.value).startswith(f"ATTNZOO_PLUGINS={paths!r}")


@pytest.mark.heavy
def test_a_broken_plugin_is_one_line_of_the_command_line(run):
    result = run(*LIST, ATTNZOO_PLUGINS="no_such_file.py")
    assert result.returncode == 2
    assert result.stderr.startswith("attnzoo list: error: ATTNZOO_PLUGINS='no_such_file.py': ")
    assert result.stderr.count("\n") == 1


@pytest.mark.heavy
def test_list_goes_on_past_a_variant_that_cannot_be_built(run, tmp_path):
    text = TEMPLATE.read_text(encoding="utf-8").replace("num_heads: int = 4", "num_heads: int = 7")
    (tmp_path / "seven.py").write_text(text.replace('register("mine")', 'register("seven")'), encoding="utf-8")
    result = run(*LIST, ATTNZOO_PLUGINS=str(tmp_path / "seven.py"))
    assert result.returncode == 1
    assert "\nsoftmax_regression " in result.stdout
    assert "attnzoo list: seven (seven.py) cannot be built: ValueError: model_dim=256 is not" in result.stderr


WITHOUT_COST = "    def cost(self, *sizes):\n        return 1 / 0\n"
NARROW = "    def forward(self, x, **what):\n        return super().forward(x, **what)[:, :1]\n"
OPTIONS = """\
from dataclasses import dataclass
from attnzoo.attention.base import ATTENTION
from attnzoo.attention.mha import MHA, MHAConfig
@dataclass(frozen=True, kw_only=True)
class Config(MHAConfig):
    sizes: tuple[int, ...] = (1, 2)
@ATTENTION.register("a")
class A(MHA):
    source, Config = "s", Config
"""


@pytest.fixture
def plugged(tmp_path):
    """Loads a plug-in that registers "a", and takes it back."""

    def load(content: str) -> None:
        (tmp_path / "plugin.py").write_text(content, encoding="utf-8")
        load_plugins(str(tmp_path / "plugin.py"))

    yield load
    ATTENTION.remove("a")


def test_what_a_variant_does_wrong_is_said_of_it(plugged, capsys):
    plugged(MINE + WITHOUT_COST + NARROW)
    assert main(["describe", "a"]) == 2
    error = capsys.readouterr().err
    assert error == "attnzoo describe: error: a (plugin.py) cannot be described: ZeroDivisionError: division by zero\n"
    model = DecoderLM(DecoderConfig(vocab_size=9, model_dim=8, num_layers=1, attention="a"))
    with pytest.raises(ValueError, match=r"A returned \[2, 1, 8\] for an input of \[2, 3, 8\]; a variant must keep"):
        model(torch.zeros(2, 3, dtype=torch.long))  # a sum would spread it over all tokens


def test_a_field_of_a_type_that_is_not_there(plugged):
    plugged(OPTIONS.replace("tuple[int, ...]", '"Sizes"'))
    with pytest.raises(ValueError, match=r"Config has a field with an unknown type: name 'Sizes' is not defined"):
        DecoderConfig(vocab_size=9, model_dim=8, num_layers=1, attention="a")


def test_options_that_are_tuples_come_back_from_a_file(plugged, tmp_path, capsys):
    """JSON and YAML have lists only; an export says what loading it needs."""
    plugged(OPTIONS)
    spec = {"kind": "a", "sizes": [3, 4]}
    model = DecoderLM(DecoderConfig(vocab_size=9, model_dim=8, num_layers=1, attention=spec)).requires_grad_(False)
    save_model(tmp_path / "model", model)
    assert load_model(tmp_path / "model").blocks[0].attention.config.sizes == (3, 4)
    for value, message in (([3, "4"], r"sizes\[1\]='4' has type str; it must be int"), (7, r"it must be tuple\[int")):
        with pytest.raises(ValueError, match=message):
            DecoderConfig(vocab_size=9, model_dim=8, num_layers=1, attention=spec | {"sizes": value})
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out")]) == 0
    assert "\na is a variant of ATTNZOO_PLUGINS, which must name its file" in capsys.readouterr().out


def test_a_checkpoint_without_its_plugin(tmp_path):
    """What is missing is the plug-in: exporting again would not help, and is not possible. In both formats."""
    model = {"vocab_size": 9, "model_dim": 8, "num_layers": 1, "attention": "kerple"}
    for content in ({"format": "attnzoo-decoder-1", "model": model}, {"model_type": "attnzoo", "decoder": model}):
        (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(ValueError, match=r"unknown attention 'kerple'.*ATTNZOO_PLUGINS is not set") as error:
            open_checkpoint(tmp_path)
        assert "export the model again" not in str(error.value)


def test_template_itself_is_not_registered():
    assert "mine" not in ATTENTION
