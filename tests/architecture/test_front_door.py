"""What `import attnzoo` gives: few names, loaded when they are used, and types for who checks them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attnzoo
from attnzoo.attention import ATTENTION
from attnzoo.kvcache import CACHES

ROOT = Path(__file__).resolve().parents[2]
NAMES = [
    "CacheUse",
    "Continuation",
    "Generation",
    "GenerationConfig",
    "GenerationStream",
    "LanguageModel",
    "__version__",
    "attention",
    "caches",
    "load",
    "variants",
]
"""A name here is a promise to users: adding one is a decision, taking one away needs a release that warns."""


def printed(*codes: str, first: str = "pass") -> list[str]:
    """What each code prints in an interpreter that has done `first` and nothing else: forks of one."""
    program = f"{first}\nimport os\nfor code in {codes!r}:\n"
    program += "    if os.fork() == 0:\n        exec(code, {})\n        break\n    os.wait()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.splitlines()


def test_the_names_are_these():
    assert sorted(attnzoo.__all__) == NAMES
    assert set(NAMES) <= set(dir(attnzoo))
    for name in NAMES:
        found = getattr(attnzoo, name)
        assert name == "__version__" or found.__doc__
    with pytest.raises(AttributeError, match="module 'attnzoo' has no attribute 'atention'"):
        _ = attnzoo.atention
    assert (ROOT / "attnzoo" / "py.typed").is_file()


@pytest.mark.heavy
def test_names_are_loaded_when_they_are_used():
    """Nothing comes with the import: not torch, and of this project nothing but the names. Nor does it matter what was
    imported before."""
    ours = "sorted(n for n in sys.modules if n.split('.')[0] in ('attnzoo', 'torch', 'numpy'))"
    assert printed(f"import sys, attnzoo; print({ours})") == ["['attnzoo']"]
    without = (
        "print([n for n in ('tokenizers', 'jinja2', 'gguf', 'sentencepiece', 'transformers') if n in sys.modules])"
    )
    build = "print(type(attnzoo.attention('rcmha', model_dim=16, num_heads=2)).__name__)"
    assert printed(
        f"import sys, attnzoo; attnzoo.load; attnzoo.attention; attnzoo.variants(); {without}",
        "from attnzoo import *; print(callable(attention), callable(load), LanguageModel.__name__)",
        f"import attnzoo; {build}",
        f"import attnzoo; from attnzoo.attention import ATTENTION; {build}",
        first="import torch",
    ) == ["[]", "True True LanguageModel", "RCMHA", "RCMHA"]


def test_layers():
    assert attnzoo.variants() == ATTENTION.names()
    assert attnzoo.caches() == CACHES.names()
    for name in attnzoo.variants():
        layer = attnzoo.attention(name, model_dim=24, dtype="float64", device="cpu")
        x = torch.randn(2, 7, 24, dtype=torch.float64)
        y = layer(x)
        assert y.shape == x.shape
        assert torch.equal(y, layer.forward(x))
    assert attnzoo.attention("mha", model_dim=64, num_heads=8).config.num_heads == 8


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rcmah", {"model_dim": 8}, "unknown attention 'rcmah'; did you mean 'rcmha'.*ATTNZOO_PLUGINS"),
        (
            "rcmha",
            {"model_dim": 8, "num_hads": 2},
            "unknown key rcmha.num_hads; did you mean 'num_heads'.*known: .*conv_width",
        ),
        ("rcmha", {"model_dim": 8, "num_heads": 3}, "model_dim=8 is not a multiple of num_heads=3"),
        ("rcmha", {"model_dim": "8"}, "rcmha.model_dim='8' has type str"),
        ("rcmha", {"model_dim": 8, "dtype": "fp23"}, "unknown dtype 'fp23'"),
    ],
)
def test_layers_are_refused_by_name(name, options, message):
    with pytest.raises(ValueError, match=message):
        attnzoo.attention(name, **options)
