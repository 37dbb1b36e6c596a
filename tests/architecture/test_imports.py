"""The import law, read from the syntax trees: who may import whom, and what stays out of a light import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ["attnzoo", "train", "serve"]
SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]

ORDER = [
    "interrupts",
    "errors",
    "files",
    "apps",
    "settings",
    "gguf_file",
    "types",
    "derived_memory",
    "derived_flops",
    "registry",
    "ops",
    "kvcache",
    "attention",
    "incontext",
    "diffusion",
    "models",
    "tokenizer",
    "checkpoint",
    "generation",
    "language_model",
    "loading",
    "intervals",
    "texts",
    "report",
    "progress",
    "figures",
    "workers",
    "clinical",
    "vision",
    "profiling",
    "tasks",
    "planner",
    "hf",
    "export",
    "attention_page",
    "cli",
]
"""Inside attnzoo each may import only what stands before it."""

OWNERS = {"deepspeed": ["train/engine.py"], "ray": ["serve/deployment.py", "train/sweep.py"]}
"""Packages that few files own: ray.serve is the deployment's, ray.tune the sweep's."""

SWEEP = "train/sweep.py"
"""Runs the comparison under scripts/ as trials of Ray Tune; nothing imports it."""

RUN_OTHERS = ["tests/contract/test_cache_mutants.py"]
"""Test files that run tests of other files: mutants must fail them."""

FORBIDDEN = {
    "attnzoo": {
        "deepspeed",
        "ray",
        "fastapi",
        "datasets",
        "omegaconf",
        "lm_eval",
        "train",
        "serve",
        "scripts",
        "tests",
    },
    "train": {"serve", "scripts", "tests", "fastapi", "lm_eval"},
    "serve": {"train", "scripts", "tests", "deepspeed", "lm_eval"},
}


def imported(path: Path) -> set[str]:
    """Dotted names of all modules a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; say where it comes from"
            assert node.module
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_import_law(path):
    room = path.relative_to(ROOT).parts[0]
    for name in imported(path):
        package = name.split(".")[0]
        assert package not in FORBIDDEN[room] or short(path) == SWEEP, f"{short(path)} imports {name}"
        if package in OWNERS:
            assert short(path) in OWNERS[package], f"{short(path)} imports {name}; only {OWNERS[package]} may"
        if package == "triton":
            assert short(path).startswith("attnzoo/ops/"), f"{short(path)} imports triton; only operations may"
        if package == "transformers":
            assert short(path).startswith("attnzoo/hf/"), f"{short(path)} imports transformers; only attnzoo/hf may"


@pytest.mark.parametrize("path", [p for p in SOURCES if short(p).startswith("attnzoo/")], ids=short)
def test_order_inside_attnzoo(path):
    own = path.relative_to(ROOT / "attnzoo").parts[0].removesuffix(".py")
    if own in ("__init__", "__main__"):
        return
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "attnzoo" and len(parts) > 1 and parts[1] != own:
            assert ORDER.index(parts[1]) < ORDER.index(own), f"{short(path)} imports {name} against the order"


@pytest.mark.heavy
def test_import_is_light():
    heavy = [
        "deepspeed",
        "ray",
        "fastapi",
        "datasets",
        "omegaconf",
        "sentencepiece",
        "matplotlib",
        "triton",
        "pydantic",
        "tokenizers",
        "jinja2",
        "gguf",
        "transformers",
        "peft",
    ]
    code = (
        f"import sys, torch; by_torch = set(sys.modules); "
        "import attnzoo, attnzoo.attention, attnzoo.models, attnzoo.checkpoint, attnzoo.tokenizer, attnzoo.export; "
        f"print(*(n for n in {heavy!r} if n in sys.modules and n not in by_torch))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.split() == []


@pytest.mark.parametrize("folder", [*ROOMS, "scripts", "tests"])
def test_files_stay_small(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 400, f"{short(path)} has {lines} lines, more than 400; split it by topic"


def test_what_tests_share_is_no_test_file():
    """It stands in tests/helpers, or beside the tests in a file that holds none."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if short(path) in RUN_OTHERS:
            continue
        for name in imported(path):
            parts = name.split(".")
            assert not (parts[0] == "tests" and any(part.startswith("test_") for part in parts)), (
                f"{short(path)} imports {name}; what files share stands in tests/helpers"
            )


def test_functions_stay_small():
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 60, f"{short(path)}: {node.name} has {length} lines; split it"
                if "triton.jit" in map(ast.unparse, node.decorator_list):
                    continue  # a kernel has no objects to bundle its pointers in
                arguments = node.args.args + node.args.kwonlyargs + node.args.posonlyargs
                # Operations are pure functions of tensors: what would be a config object elsewhere is their input.
                most = 9 if short(path).startswith("attnzoo/ops/") else 8
                assert len([a for a in arguments if a.arg not in ("self", "cls")]) <= most, (
                    f"{short(path)}: {node.name} takes more than {most} parameters; use a config object"
                )


def test_nothing_unpickles_what_others_wrote():
    """Exports are safetensors and JSON; pickle appears nowhere, torch.load only where training reads its own files."""
    for path in SOURCES:
        assert not {name for name in imported(path) if name.split(".")[0] in ("pickle", "dill", "cloudpickle")}, path
        if short(path) not in ("train/checkpoint.py", "train/engine.py"):
            assert "torch.load(" not in path.read_text(encoding="utf-8"), short(path)


def test_modules_do_not_import_one_another():
    """No circle of modules, wherever in a file the imports stand."""
    paths = {dotted(path): path for path in SOURCES}
    needs = {}
    for name, path in paths.items():
        found = imported(path)
        # A name is a module, or stands in one; what a package gathers from its modules is no circle.
        parents = {each.rpartition(".")[0] for each in found if each not in paths}
        needs[name] = (found | {p for p in parents if p in paths and paths[p].name != "__init__.py"}) - {name}
    while free := [name for name, others in needs.items() if not others & needs.keys()]:
        for name in free:
            del needs[name]
    assert not needs, f"these modules import one another: {', '.join(sorted(needs))}"


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
